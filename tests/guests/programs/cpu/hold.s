# fn hold_LEVEL(before: *const Registers (rdi), after: *mut Registers (rsi), spins: u64 (rdx))
#
# Loads every register from `before`, spins, and stores every register to `after`. What a move does to a
# vCPU, it does in the middle of the spin, nearly always. Offsets: cpu/registers.rs.

.set AT_VECTORS, 0
.set AT_MASKS, 2048
.set AT_X87, 2112
.set AT_GENERAL, 2240
.set AT_MXCSR, 2320
.set AT_CONTROL, 2324
.set AT_FS, 2328
.set AT_GS, 2336

.macro enter_hold
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushq $0x1f80                # the ABI's MXCSR, for the return
    movq %rdx, %rcx
    fninit
    fldcw AT_CONTROL(%rdi)
    .set slot, 7
    .rept 8
    fldt AT_X87 + 16 * slot(%rdi)
    .set slot, slot - 1
    .endr
    ldmxcsr AT_MXCSR(%rdi)
.endm

.macro general_registers
    movq AT_GENERAL + 0(%rdi), %rbx
    movq AT_GENERAL + 8(%rdi), %rbp
    movq AT_GENERAL + 16(%rdi), %r8
    movq AT_GENERAL + 24(%rdi), %r9
    movq AT_GENERAL + 32(%rdi), %r10
    movq AT_GENERAL + 40(%rdi), %r11
    movq AT_GENERAL + 48(%rdi), %r12
    movq AT_GENERAL + 56(%rdi), %r13
    movq AT_GENERAL + 64(%rdi), %r14
    movq AT_GENERAL + 72(%rdi), %r15
1:  decq %rcx
    jnz 1b
    movq %rbx, AT_GENERAL + 0(%rsi)
    movq %rbp, AT_GENERAL + 8(%rsi)
    movq %r8, AT_GENERAL + 16(%rsi)
    movq %r9, AT_GENERAL + 24(%rsi)
    movq %r10, AT_GENERAL + 32(%rsi)
    movq %r11, AT_GENERAL + 40(%rsi)
    movq %r12, AT_GENERAL + 48(%rsi)
    movq %r13, AT_GENERAL + 56(%rsi)
    movq %r14, AT_GENERAL + 64(%rsi)
    movq %r15, AT_GENERAL + 72(%rsi)
    movq %fs:0, %rax
    movq %rax, AT_FS(%rsi)
    movq %gs:0, %rax
    movq %rax, AT_GS(%rsi)
.endm

.macro leave_hold
    stmxcsr AT_MXCSR(%rsi)
    fnstcw AT_CONTROL(%rsi)
    .set slot, 0
    .rept 8
    fstpt AT_X87 + 16 * slot(%rsi)
    .set slot, slot + 1
    .endr
    fninit
    ldmxcsr (%rsp)
    popq %rax
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
.endm

.macro vectors operation, kind, count, load
    .altmacro
    .set slot, 0
    .rept \count
    one_vector \operation, \kind, %slot, \load
    .set slot, slot + 1
    .endr
    .noaltmacro
.endm
.macro one_vector operation, kind, slot, load
    .if \load
    \operation AT_VECTORS + 64 * \slot(%rdi), %\kind\slot
    .else
    \operation %\kind\slot, AT_VECTORS + 64 * \slot(%rsi)
    .endif
.endm
.macro masks load
    .altmacro
    .set slot, 0
    .rept 8
    one_mask %slot, \load
    .set slot, slot + 1
    .endr
    .noaltmacro
.endm
.macro one_mask slot, load
    .if \load
    kmovw AT_MASKS + 8 * \slot(%rdi), %k\slot
    .else
    kmovw %k\slot, AT_MASKS + 8 * \slot(%rsi)
    .endif
.endm

.text
.globl hold_sse
hold_sse:
    enter_hold
    vectors movups, xmm, 16, 1
    general_registers
    vectors movups, xmm, 16, 0
    leave_hold

.globl hold_avx
hold_avx:
    enter_hold
    vectors vmovups, ymm, 16, 1
    general_registers
    vectors vmovups, ymm, 16, 0
    vzeroupper
    leave_hold

.globl hold_avx512
hold_avx512:
    enter_hold
    vectors vmovups, zmm, 32, 1
    masks 1
    general_registers
    masks 0
    vectors vmovups, zmm, 32, 0
    vzeroupper
    leave_hold

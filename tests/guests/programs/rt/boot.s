# Ring 0 of the guest programs: PVH entry, AP entry, descriptor tables, interrupt entries, services.
#
# A software KVM interprets every line of this file, at 1-2 us an instruction, and knows only plain
# integer instructions. So all tables (page tables, GDT, TSS, IDT) are laid out by the assembler, the
# entry only loads registers, and everything else runs in ring 3.

.set MAX_CPUS, 64                # rt/machine.rs: MAX_CPUS
.set VECTORS, 0x100000           # guest.ld puts and checks them there
.set TASK_STATES, 0x101000
.set TSS_SIZE, 128
.set IO_BITMAP, TASK_STATES + MAX_CPUS * TSS_SIZE
.set KERNEL_CS, 0x08
.set KERNEL_DS, 0x10
.set USER_DS, 0x1b
.set USER_CS, 0x23
.set KERNEL_CS32, 0x28
.set FIRST_TSS, 0x30
.set STACK, 4096                 # ring 0 stack of a CPU; rt/percpu.rs: its lower end is `PerCpu`
.set USER_STACK, 32768
.set PERCPU_TICKS, 0x00
.set PERCPU_XCR0, 0x08
.set PERCPU_HAS_CLOCK, 0x10
.set PERCPU_CLOCK, 0x40
.set TIMER_VECTOR, 0x20
.set SPURIOUS_VECTOR, 0x3f
.set INVALID_OPCODE, 6
.set SERVICE_MAGIC, 0x5e2f1ce0   # rt/service.rs: MAGIC

# ---- PVH note: XEN_ELFNOTE_PHYS32_ENTRY (18), the 32-bit entry point --------------------------------
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long _start

# ---- Interrupt entries, at addresses that the IDT below can compute ---------------------------------
.section .boot.vectors, "ax", @progbits
.code64
.globl vectors
vectors:
.set vector, 0
.rept 32
    .balign 16
    # 8, 10-14, 17, 21, 29 and 30 push an error code (Intel SDM 3A, table 6-1).
    .if (0x60227d00 >> vector) & 1 == 0
    pushq $0
    .endif
    pushq $vector
    jmp exception
    .set vector, vector + 1
.endr

.org 0x200
timer_entry:
    pushq %rax
    pushq %rcx
    pushq %rdx
    movq %rsp, %rax
    andq $-STACK, %rax
    incq PERCPU_TICKS(%rax)
    cmpb $0, x2apic_on
    je 1f
    movl $0x80b, %ecx            # x2APIC EOI
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    jmp 2f
1:  movl $0xfee000b0, %eax       # xAPIC EOI
    movl $0, (%rax)
2:  popq %rdx
    popq %rcx
    popq %rax
    iretq

.org 0x2f0
spurious_entry:
    iretq

# A service call is UD2 with a magic number in r11, because a software KVM can take an exception from
# ring 3 but neither INT n (#UD) nor find a stack for SYSCALL. Number in rax, arguments in rdi, rsi, result in
# rax; rcx and rdx are lost. The list is rt/service.rs.
.org 0x300
invalid_opcode_entry:
    cmpl $SERVICE_MAGIC, %r11d
    je 2f
    pushq $0
    pushq $6
    jmp exception
2:  addq $2, (%rsp)              # on, behind the UD2
    cmpq $(services_end - services) / 8, %rax
    jae 1f
    jmpq *services(,%rax,8)
1:  movq $-1, %rax
    iretq

service_idle:
    sti
    hlt
    cli
    iretq
service_lapic_read:
    cmpb $0, x2apic_on
    je 1f
    movl %edi, %ecx
    shrl $4, %ecx
    addl $0x800, %ecx
    rdmsr
    shlq $32, %rdx
    movl %eax, %eax
    orq %rdx, %rax
    iretq
1:  movl $0xfee00000, %eax
    addq %rdi, %rax
    movl (%rax), %eax
    iretq
service_lapic_write:
    cmpb $0, x2apic_on
    je 1f
    movl %edi, %ecx
    shrl $4, %ecx
    addl $0x800, %ecx
    movl %esi, %eax
    movq %rsi, %rdx
    shrq $32, %rdx
    wrmsr
    iretq
1:  movl $0xfee00000, %eax
    addq %rdi, %rax
    movl %esi, (%rax)
    iretq
service_send_ipi:                # rdi: APIC id, rsi: low half of the ICR
    cmpb $0, x2apic_on
    je 1f
    movl $0x830, %ecx
    movl %esi, %eax
    movl %edi, %edx
    wrmsr
    iretq
1:  movl $0xfee00300, %eax
    shll $24, %edi
    movl %edi, 0x10(%rax)
    movl %esi, (%rax)
    iretq
service_read_msr:
    movl %edi, %ecx
    rdmsr
    shlq $32, %rdx
    movl %eax, %eax
    orq %rdx, %rax
    iretq
service_write_msr:
    movl %edi, %ecx
    movl %esi, %eax
    movq %rsi, %rdx
    shrq $32, %rdx
    wrmsr
    xorl %eax, %eax
    iretq
service_cpuid:                   # rdi: leaf | subleaf << 32, rsi: four u32
    pushq %rbx
    movl %edi, %eax
    movq %rdi, %rcx
    shrq $32, %rcx
    cpuid
    movl %eax, (%rsi)
    movl %ebx, 4(%rsi)
    movl %ecx, 8(%rsi)
    movl %edx, 12(%rsi)
    popq %rbx
    iretq
service_write_debug:             # rdi: dr0, dr1, dr2, dr3, dr6, dr7
    movq (%rdi), %rax
    movq %rax, %dr0
    movq 8(%rdi), %rax
    movq %rax, %dr1
    movq 16(%rdi), %rax
    movq %rax, %dr2
    movq 24(%rdi), %rax
    movq %rax, %dr3
    movq 32(%rdi), %rax
    movq %rax, %dr6
    movq 40(%rdi), %rax
    movq %rax, %dr7
    iretq
service_read_debug:
    movq %dr0, %rax
    movq %rax, (%rdi)
    movq %dr1, %rax
    movq %rax, 8(%rdi)
    movq %dr2, %rax
    movq %rax, 16(%rdi)
    movq %dr3, %rax
    movq %rax, 24(%rdi)
    movq %dr6, %rax
    movq %rax, 32(%rdi)
    movq %dr7, %rax
    movq %rax, 40(%rdi)
    iretq
service_read_tsc:
    rdtsc
    shlq $32, %rdx
    movl %eax, %eax
    orq %rdx, %rax
    iretq
service_triple_fault:
    lidt no_idt
    ud2
service_halt:
    cli
1:  hlt
    jmp 1b

# Prints "guest: exception VV EEEE RIP CR2" in hex and stops this CPU for good.
exception:
    leaq exception_text, %rsi
1:  movb (%rsi), %al
    testb %al, %al
    jz 2f
    movw $0x3f8, %dx
    outb %al, %dx
    incq %rsi
    jmp 1b
2:  movq (%rsp), %rbx            # vector
    call print_hex
    movq 8(%rsp), %rbx           # error code
    call print_hex
    movq 16(%rsp), %rbx          # rip
    call print_hex
    movq %cr2, %rbx
    call print_hex
    movb $10, %al
    outb %al, %dx
3:  cli
    hlt
    jmp 3b
print_hex:
    movl $16, %ecx
    movw $0x3f8, %dx
    movb $' ', %al
    outb %al, %dx
1:  rolq $4, %rbx
    movb %bl, %al
    andb $15, %al
    addb $'0', %al
    cmpb $'9', %al
    jbe 2f
    addb $39, %al
2:  outb %al, %dx
    decl %ecx
    jnz 1b
    ret

# ---- Descriptor and page tables ---------------------------------------------------------------------
.section .boot.tables, "aw", @progbits
.globl task_states
task_states:
.set cpu, 0
.rept MAX_CPUS
    .long 0
    .quad ring0_stacks + (cpu + 1) * STACK       # RSP0
    .fill 90, 1, 0
    .word IO_BITMAP - (TASK_STATES + cpu * TSS_SIZE)
    .fill TSS_SIZE - 104, 1, 0
    .set cpu, cpu + 1
.endr
# All ports are open to ring 3 (IOPL is not honoured everywhere). One bitmap behind all TSSs serves every
# CPU; the byte of ones behind it is demanded by the SDM (vol. 1, 19.5.2).
    .fill 8192, 1, 0
    .byte 0xff

    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff                     # 0x08 ring 0 code
    .quad 0x00cf93000000ffff                     # 0x10 ring 0 data
    .quad 0x00cff3000000ffff                     # 0x18 ring 3 data
    .quad 0x00affb000000ffff                     # 0x20 ring 3 code
    .quad 0x00cf9b000000ffff                     # 0x28 ring 0 code, 32 bit
.set cpu, 0
.rept MAX_CPUS
    .set base, TASK_STATES + cpu * TSS_SIZE
    .word IO_BITMAP - base + 8192                # limit: up to the byte of ones
    .word base & 0xffff
    .byte (base >> 16) & 0xff, 0x89, 0, (base >> 24) & 0xff
    .quad 0
    .set cpu, cpu + 1
.endr
gdt_end:

    .balign 16
idt:
.set vector, 0
.rept SPURIOUS_VECTOR + 1
    .set target, 0
    .if vector < 32
    .set target, VECTORS + vector * 16
    .endif
    .if vector == TIMER_VECTOR
    .set target, VECTORS + 0x200
    .endif
    .if vector == SPURIOUS_VECTOR
    .set target, VECTORS + 0x2f0
    .endif
    .if vector == INVALID_OPCODE
    .set target, VECTORS + 0x300
    .endif
    .if target == 0
    .quad 0, 0
    .else
    .word target & 0xffff, KERNEL_CS, 0x8e00, target >> 16
    .quad 0
    .endif
    .set vector, vector + 1
.endr
idt_end:

    .balign 8
services:                                        # rt/service.rs: Service
    .quad service_idle, service_lapic_read, service_lapic_write, service_send_ipi
    .quad service_read_msr, service_write_msr, service_cpuid
    .quad service_write_debug, service_read_debug, service_read_tsc
    .quad service_triple_fault, service_halt
services_end:

    .balign 8
    .word 0
gdtr:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 8
idtr:
    .word idt_end - idt - 1
    .quad idt
no_idt:
    .word 0
    .quad 0
.globl ap_index
    .balign 4
ap_index:
    .long 0
boot_info:
    .long 0
.globl x2apic_on
x2apic_on:
    .byte 0
exception_text:
    .asciz "\nguest: exception"

# Identity map of the first 4 GiB, 2 MiB pages, open to ring 3, which extends it (rt/machine.rs).
    .balign 4096
.globl page_map_level4
page_map_level4:
    .quad page_directory_pointers + 7
    .fill 511, 8, 0
.globl page_directory_pointers
page_directory_pointers:
    .quad page_directories + 7
    .quad page_directories + 0x1007
    .quad page_directories + 0x2007
    .quad page_directories + 0x3007
    .fill 508, 8, 0
page_directories:
.set page, 0
.rept 2048
    .if page < 2032
    .quad page * 0x200000 + 0x87                 # present, writable, user, 2 MiB
    .else
    .quad page * 0x200000 + 0x9f                 # the last 32 MiB are device windows: uncached
    .endif
    .set page, page + 1
.endr

# ---- Entry ------------------------------------------------------------------------------------------
.section .boot.text, "ax", @progbits
.code32
.globl _start
_start:
    movw $0x3f8, %dx             # the first thing a guest does: `!` marks its first instructions
    movb $'!', %al
    outb %al, %dx
    cli
    cld
    movl %ebx, boot_info
    xorl %ebp, %ebp
enter_long_mode:                 # ebp: CPU index
    movl $0x620, %eax            # CR4: PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $page_map_level4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx       # EFER.LME
    movl $0x100, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80010033, %eax       # CR0: PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    lgdt gdtr
    ljmpl $KERNEL_CS, $long_mode
.code64
long_mode:
    movl $KERNEL_DS, %eax
    movl %eax, %ss
    movl %eax, %ds
    movl %eax, %es
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    lidt idtr
    movl %ebp, %eax
    shll $4, %eax
    addl $FIRST_TSS, %eax
    ltr %ax
    movl %ebp, %esp
    incl %esp
    shll $12, %esp
    addq $ring0_stacks, %rsp
    leaq -STACK(%rsp), %r12      # PerCpu

    # Extended state: what CPUID offers of x87, SSE, AVX, AVX-512.
    xorl %r13d, %r13d
    movl $1, %eax
    xorl %ecx, %ecx
    cpuid
    movl %ecx, %r14d
    btl $26, %r14d
    jnc 1f
    movq %cr4, %rax
    orl $0x40000, %eax
    movq %rax, %cr4
    movl $13, %eax
    xorl %ecx, %ecx
    cpuid
    andl $0xe7, %eax
    movl %eax, %ecx
    andl $0xe4, %ecx
    cmpl $0xe4, %ecx
    je 2f
    andl $7, %eax
2:  movl %eax, %r13d
    xorl %edx, %edx
    xorl %ecx, %ecx
    xsetbv
1:  movq %r13, PERCPU_XCR0(%r12)

    # Local APIC, as x2APIC where there is one.
    movl $0x1b, %ecx
    rdmsr
    orl $0x800, %eax
    btl $21, %r14d
    jnc 1f
    orl $0x400, %eax
    wrmsr
    movb $1, x2apic_on
    movl $0x80f, %ecx
    movl $0x100 + SPURIOUS_VECTOR, %eax
    xorl %edx, %edx
    wrmsr
    jmp 2f
1:  wrmsr
    movl $0xfee000f0, %eax
    movl $0x100 + SPURIOUS_VECTOR, (%rax)
2:
    # KVM clock: feature bit 3 is MSR_KVM_SYSTEM_TIME_NEW (Documentation/virt/kvm/x86/cpuid.rst).
    movq $0, PERCPU_HAS_CLOCK(%r12)
    movl $0x40000000, %eax
    cpuid
    cmpl $0x4b4d564b, %ebx       # "KVMK"
    jne 1f
    movl $0x40000001, %eax
    cpuid
    btl $3, %eax
    jnc 1f
    movl $0x4b564d01, %ecx
    leaq PERCPU_CLOCK + 1(%r12), %rax
    xorl %edx, %edx
    wrmsr
    movq $1, PERCPU_HAS_CLOCK(%r12)
1:
    movl %ebp, %edi
    movl boot_info, %esi
    movl %ebp, %eax
    incl %eax
    imull $USER_STACK, %eax, %eax
    addq $ring3_stacks - 8, %rax # as after a call: the ABI wants rsp = 8 mod 16 at a function's entry
    pushq $USER_DS
    pushq %rax
    pushq $0x202                 # interrupts on
    pushq $USER_CS
    pushq $ring3_entry
    iretq

# AP entry in real mode; rt/smp.rs copies it to a page below 1 MiB.
.code16
.globl ap_trampoline
.globl ap_trampoline_end
ap_trampoline:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl ap_gdtr - ap_trampoline
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $KERNEL_CS32, $ap_protected
    .balign 4
ap_gdtr:
    .word gdt_end - gdt - 1
    .long gdt
ap_trampoline_end:
.code32
ap_protected:
    movl $KERNEL_DS, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl ap_index, %ebp
    jmp enter_long_mode

.section .stacks, "aw", @nobits
    .balign 4096
.globl ring0_stacks
ring0_stacks:
    .skip MAX_CPUS * STACK
ring3_stacks:
    .skip MAX_CPUS * USER_STACK

.text
.code64

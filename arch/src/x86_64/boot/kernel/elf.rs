//! ELF executables with a PVH note.

use std::io::{Read, Seek};

use linux_loader::elf::{EM_X86_64, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::ByteValued;

use super::{Segment, Source, check_memory};
use crate::x86_64::boot::MemoryMap;
use crate::x86_64::boot::error::BootError;

/// Type of the note that holds the 32-bit entry point, of owner "Xen" (Xen
/// `xen/include/public/elfnote.h`, XEN_ELFNOTE_PHYS32_ENTRY).
const PHYS32_ENTRY: u32 = 18;
const NOTE_OWNER: &[u8] = b"Xen\0";
/// Most program headers accepted; a Linux kernel has five.
const MAX_PROGRAM_HEADERS: u64 = 256;
/// Largest note segment accepted; a Linux kernel's has some hundred bytes.
const MAX_NOTES: u64 = 64 << 10;

/// A PVH kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct ElfKernel {
    /// The 32-bit entry point of the PVH note, within one of the segments.
    pub(in super::super) entry: u64,
    /// What to load; they do not overlap.
    pub(in super::super) segments: Vec<Segment>,
}

/// Reads the headers and notes.
pub(super) fn parse<K: Read + Seek>(
    file: &mut Source<'_, K>,
    map: &MemoryMap,
) -> Result<ElfKernel, BootError> {
    let mut header = Elf64_Ehdr::default();
    file.read("the ELF header", 0, header.as_mut_slice())?;
    check_header(&header)?;

    let mut segments = Vec::new();
    let mut entry = None;
    for number in 0..u64::from(header.e_phnum) {
        let mut program = Elf64_Phdr::default();
        let size = size_of::<Elf64_Phdr>() as u64;
        let at = header.e_phoff.saturating_add(number * size);
        file.read("the ELF program header table", at, program.as_mut_slice())?;
        match program.p_type {
            PT_LOAD if program.p_memsz != 0 => segments.push(segment(file, map, &program)?),
            PT_NOTE if entry.is_none() => entry = pvh_entry(file, &program)?,
            _ => {}
        }
    }
    check_overlaps(&mut segments)?;
    let entry = entry.ok_or(BootError::NoPvhNote)?;
    if !segments
        .iter()
        .any(|s| s.gpa <= entry && entry < s.gpa + s.file_size)
    {
        return Err(BootError::EntryOutsideSegments(entry));
    }
    Ok(ElfKernel { entry, segments })
}

/// ELF64, little-endian, x86-64, with program headers of the expected size.
fn check_header(header: &Elf64_Ehdr) -> Result<(), BootError> {
    let fields = [
        ("class (EI_CLASS)", u64::from(header.e_ident[4]), 2),
        ("byte order (EI_DATA)", u64::from(header.e_ident[5]), 1),
        (
            "machine (e_machine)",
            u64::from(header.e_machine),
            u64::from(EM_X86_64),
        ),
        (
            "program header size (e_phentsize)",
            u64::from(header.e_phentsize),
            size_of::<Elf64_Phdr>() as u64,
        ),
    ];
    for (field, found, expected) in fields {
        if found != expected {
            return Err(BootError::ElfUnsupported {
                field,
                found,
                expected,
            });
        }
    }
    let found = u64::from(header.e_phnum);
    if found > MAX_PROGRAM_HEADERS {
        let what = "the number of ELF program headers";
        return Err(BootError::Excessive {
            what,
            found,
            max: MAX_PROGRAM_HEADERS,
        });
    }
    Ok(())
}

fn segment<K: Read + Seek>(
    file: &Source<'_, K>,
    map: &MemoryMap,
    program: &Elf64_Phdr,
) -> Result<Segment, BootError> {
    let segment = Segment {
        file_offset: program.p_offset,
        file_size: program.p_filesz,
        gpa: program.p_paddr,
        memory_size: program.p_memsz,
    };
    if segment.file_size > segment.memory_size {
        let Segment {
            gpa,
            file_size,
            memory_size,
            ..
        } = segment;
        return Err(BootError::SegmentSizes {
            gpa,
            file_size,
            memory_size,
        });
    }
    file.check("an ELF segment", segment.file_offset, segment.file_size)?;
    check_memory(map, segment.gpa, segment.memory_size)?;
    Ok(segment)
}

fn check_overlaps(segments: &mut [Segment]) -> Result<(), BootError> {
    segments.sort_unstable_by_key(|s| s.gpa);
    match segments.windows(2).find(|two| two[0].end() > two[1].gpa) {
        Some(two) => Err(BootError::SegmentsOverlap(two[1].gpa)),
        None => Ok(()),
    }
}

/// Looks for the PVH note in a note segment.
fn pvh_entry<K: Read + Seek>(
    file: &mut Source<'_, K>,
    program: &Elf64_Phdr,
) -> Result<Option<u64>, BootError> {
    if program.p_filesz > MAX_NOTES {
        let what = "the size of an ELF note segment";
        return Err(BootError::Excessive {
            what,
            found: program.p_filesz,
            max: MAX_NOTES,
        });
    }
    file.check("an ELF note segment", program.p_offset, program.p_filesz)?;
    let mut notes = vec![0; program.p_filesz as usize];
    file.read("an ELF note segment", program.p_offset, &mut notes)?;
    // Notes are aligned to 4 bytes, in segments that say so to 8 (gABI, "Note Section").
    let align = if program.p_align == 8 { 8 } else { 4 };
    find_note(&notes, align)
}

/// Walks the notes of a segment. A note that runs past its end, ends the walk.
fn find_note(mut notes: &[u8], align: usize) -> Result<Option<u64>, BootError> {
    const HEADER: usize = size_of::<Elf64_Nhdr>();
    while let Some((head, rest)) = notes.split_at_checked(HEADER) {
        let mut note = Elf64_Nhdr::default();
        note.as_mut_slice().copy_from_slice(head);
        let name_len = note.n_namesz as usize;
        let Some(name) = rest.get(..name_len) else {
            break;
        };
        // Offsets count from the start of the note; both sizes are below 4 GiB, so nothing overflows.
        let at = (HEADER + name_len).next_multiple_of(align) - HEADER;
        let descriptor_len = note.n_descsz as usize;
        let Some(descriptor) = rest.get(at..).and_then(|rest| rest.get(..descriptor_len)) else {
            break;
        };
        if note.n_type == PHYS32_ENTRY && name == NOTE_OWNER {
            // An address beyond 4 GiB is in no segment, and refused for that.
            return match *descriptor {
                [a, b, c, d] => Ok(Some(u64::from(u32::from_le_bytes([a, b, c, d])))),
                [a, b, c, d, e, f, g, h] => Ok(Some(u64::from_le_bytes([a, b, c, d, e, f, g, h]))),
                _ => Err(BootError::PvhNoteSize(note.n_descsz)),
            };
        }
        let next = (HEADER + at + descriptor_len).next_multiple_of(align);
        notes = notes.get(next..).unwrap_or_default();
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(owner: &[u8], kind: u32, descriptor: &[u8], align: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [owner.len() as u32, descriptor.len() as u32, kind] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(owner);
        bytes.resize(bytes.len().next_multiple_of(align), 0);
        bytes.extend_from_slice(descriptor);
        bytes.resize(bytes.len().next_multiple_of(align), 0);
        bytes
    }

    #[test]
    fn the_pvh_note_is_found_among_others() {
        for align in [4, 8] {
            let mut notes = note(b"GNU\0", 5, &[1; 16], align);
            notes.extend(note(b"Xenon\0", 18, &[9; 4], align));
            notes.extend(note(b"Xen\0", 6, b"linux\0", align));
            assert_eq!(find_note(&notes, align).expect("walks"), None);
            for descriptor in [
                &0x100_1000u32.to_le_bytes()[..],
                &0x100_1000u64.to_le_bytes(),
            ] {
                let mut all = notes.clone();
                all.extend(note(b"Xen\0", 18, descriptor, align));
                assert_eq!(find_note(&all, align).expect("walks"), Some(0x100_1000));
            }
        }
    }

    #[test]
    fn malformed_notes_end_the_walk_or_are_refused() {
        assert!(matches!(
            find_note(&note(b"Xen\0", 18, &[1, 2], 4), 4),
            Err(BootError::PvhNoteSize(2))
        ));
        for cut in 0..20 {
            let notes = note(b"Xen\0", 18, &[1, 0, 0, 0], 4);
            assert_eq!(
                find_note(&notes[..cut], 4).expect("no error"),
                None,
                "cut at {cut}"
            );
        }
        let huge = [
            u32::MAX.to_le_bytes(),
            u32::MAX.to_le_bytes(),
            18u32.to_le_bytes(),
        ]
        .concat();
        assert_eq!(find_note(&huge, 4).expect("no error"), None);
    }
}

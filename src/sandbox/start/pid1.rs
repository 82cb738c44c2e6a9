//! The first process of a job's pid namespace, as the program that it becomes.
//!
//! It has to be there, to survive whatever the job does, and to show nothing: its death is what ends the
//! namespace. So it is the smallest program that can do that, written out here: an ELF header, one segment, and
//! two system calls. It takes itself out of reach (`PR_SET_DUMPABLE` 0) and waits for ever. Children that are
//! left to it vanish by themselves, for `SIGCHLD` is ignored before it starts.

const HEADERS: u64 = 64 + 56;
/// Where the program is loaded; any free page-aligned address will do.
const BASE: u64 = 0x40_0000;

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "x86_64")]
const CODE: &[u8] = &[
    0xb8, 157, 0, 0, 0, // mov eax, SYS_prctl
    0xbf, 4, 0, 0, 0, // mov edi, PR_SET_DUMPABLE
    0x31, 0xf6, // xor esi, esi
    0x0f, 0x05, // syscall
    0xb8, 34, 0, 0, 0, // mov eax, SYS_pause
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp to SYS_pause
];

#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;
#[cfg(target_arch = "aarch64")]
const CODE: &[u8] = AARCH64;
#[cfg(any(test, target_arch = "aarch64"))]
const AARCH64: &[u8] = &[
    0x80, 0x00, 0x80, 0xd2, // mov x0, PR_SET_DUMPABLE
    0x01, 0x00, 0x80, 0xd2, // mov x1, 0
    0xe8, 0x14, 0x80, 0xd2, // mov x8, SYS_prctl
    0x01, 0x00, 0x00, 0xd4, // svc 0
    0x00, 0x00, 0x80, 0xd2, // mov x0, 0
    0x01, 0x00, 0x80, 0xd2, // mov x1, 0
    0x02, 0x00, 0x80, 0xd2, // mov x2, 0
    0x03, 0x00, 0x80, 0xd2, // mov x3, 0
    0x28, 0x09, 0x80, 0xd2, // mov x8, SYS_ppoll
    0x01, 0x00, 0x00, 0xd4, // svc 0
    0xfa, 0xff, 0xff, 0x17, // b to the second mov x0
];

/// The whole executable.
pub(in crate::sandbox) fn program() -> Vec<u8> {
    let size = HEADERS + CODE.len() as u64;
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"); // 64 bits, little-endian
    elf.extend_from_slice(&2_u16.to_le_bytes()); // an executable at a fixed address
    elf.extend_from_slice(&MACHINE.to_le_bytes());
    elf.extend_from_slice(&1_u32.to_le_bytes()); // version
    elf.extend_from_slice(&(BASE + HEADERS).to_le_bytes()); // entry point
    elf.extend_from_slice(&64_u64.to_le_bytes()); // program headers follow this header
    elf.extend_from_slice(&0_u64.to_le_bytes()); // no section headers
    elf.extend_from_slice(&0_u32.to_le_bytes()); // flags
    for number in [64_u16, 56, 1, 64, 0, 0] {
        // sizes and counts: this header, one program header, no section
        elf.extend_from_slice(&number.to_le_bytes());
    }
    elf.extend_from_slice(&1_u32.to_le_bytes()); // a segment to load
    elf.extend_from_slice(&5_u32.to_le_bytes()); // readable and executable
    for number in [0, BASE, BASE, size, size, 0x1000] {
        // offset, virtual and physical address, size in the file and in memory, alignment
        elf.extend_from_slice(&u64::to_le_bytes(number));
    }
    elf.extend_from_slice(CODE);
    elf
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

    use super::*;
    use crate::sandbox::inner_wall::{Arch, Options, describe};

    /// A call's name and its arguments.
    type Call = (&'static str, Vec<u32>);

    fn name(number: u32) -> &'static str {
        let options = Options::CLOSED;
        describe(Arch::Aarch64, &options).unwrap().find(|call| call.number == number).unwrap().name
    }

    /// Runs the code for 64-bit Arm, as far as it consists of the three instructions that it needs, until it has made
    /// so many calls.
    fn calls(code: &[u8], count: usize) -> Vec<Call> {
        let words: Vec<u32> =
            code.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        let (mut registers, mut at, mut calls) = ([None; 32], 0_usize, Vec::new());
        while calls.len() < count {
            let word = words[at];
            at += 1;
            match word >> 21 {
                // movz x(word & 31), immediate
                0b110_1001_0100 => registers[word as usize & 31] = Some((word >> 5) & 0xffff),
                // svc 0, which changes x0
                _ if word == 0xd400_0001 => {
                    calls.push((name(registers[8].unwrap()), registers.iter().map_while(|r| *r).collect()));
                    registers[0] = None;
                }
                // b
                _ if word >> 26 == 0b00_0101 => {
                    let distance = (word << 6).cast_signed() >> 6;
                    at = (at - 1).checked_add_signed(distance as isize).unwrap();
                }
                _ => panic!("instruction {word:#010x}"),
            }
        }
        calls
    }

    #[test]
    fn on_64_bit_arm_it_hides_and_waits_again_and_again() {
        let (hides, waits) = (("prctl", vec![4, 0]), ("ppoll", vec![0; 4]));
        assert_eq!(calls(AARCH64, 3), [hides, waits.clone(), waits]);
    }
}

//! A classic BPF machine as the kernel runs seccomp programs on it: what it does not know, or what leads
//! out of the program, fails the test.

use libc::sock_filter;

use super::super::bpf::FilterProgram;

#[derive(Debug, Clone, Copy)]
pub(super) struct Data {
    pub(super) nr: u32,
    pub(super) arch: u32,
    pub(super) args: [u64; 6],
}

impl Data {
    /// One word of `struct seccomp_data`, little-endian.
    fn word(&self, offset: u32) -> u32 {
        assert_eq!(offset % 4, 0, "an unaligned load");
        let wide =
            |value: u64, high: bool| u32::try_from(if high { value >> 32 } else { value & 0xffff_ffff });
        match offset {
            0 => self.nr,
            4 => self.arch,
            16..64 => {
                let argument = self.args[usize::try_from((offset - 16) / 8).unwrap()];
                wide(argument, offset % 8 == 4).unwrap()
            }
            _ => panic!("a load from {offset}, which no program of ours needs"),
        }
    }
}

/// The action, and how many instructions it took.
pub(super) fn run(program: &FilterProgram, data: &Data) -> (u32, usize) {
    let code = program.instructions();
    let (mut at, mut accumulator, mut steps) = (0, 0, 0);
    loop {
        let &sock_filter { code: operation, jt, jf, k } =
            code.get(at).expect("ran off the end of the program");
        steps += 1;
        at += 1;
        let mut branch = |holds: bool| at += usize::from(if holds { jt } else { jf });
        match operation {
            0x06 => return (k, steps),
            0x20 => accumulator = data.word(k),
            0x54 => accumulator &= k,
            0x05 => at += usize::try_from(k).unwrap(),
            0x15 => branch(accumulator == k),
            0x25 => branch(accumulator > k),
            0x35 => branch(accumulator >= k),
            0x45 => branch(accumulator & k != 0),
            _ => panic!("instruction {operation:#x}, which no program of ours needs"),
        }
    }
}

/// What the kernel checks before it takes a program.
pub(super) fn verify(program: &FilterProgram) {
    let code = program.instructions();
    assert!(!code.is_empty() && code.len() <= 4096, "{} instructions", code.len());
    assert_eq!(code.last().unwrap().code, 0x06, "the last instruction returns");
    for (at, one) in code.iter().enumerate() {
        let reach = match one.code {
            0x05 => usize::try_from(one.k).unwrap(),
            0x15 | 0x25 | 0x35 => usize::from(one.jt.max(one.jf)),
            _ => 0,
        };
        assert!(at + 1 + reach < code.len() || one.code == 0x06, "a jump out of the program at {at}");
    }
}

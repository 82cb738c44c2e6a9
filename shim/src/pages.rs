//! A zygote's memory in large pages.
//!
//! Every fork copies the zygote's page tables, every job comes to the pages of python's own code and constants
//! anew, and the end of every job takes all of that apart. What the kernel does there for each page it does but
//! once for all neighbours that are parts of one large page, and memory that belongs to no file is there after a
//! fork. So what a zygote uses is copied into large pages, which are then moved, piece by piece, to the
//! addresses of what they replace. A job that writes to one of these pages gets a copy of its 4 KiB alone, as
//! before.

use core::ffi::c_int;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use crate::sys::syscall;

const PAGE: usize = 4096;
/// What the kernel calls huge on the architectures that are supported.
const LARGE: usize = 2 << 20;
/// Anonymous memory in pieces of fewer pages stays as it is: a piece costs the kernel about as much as these.
const WORTHWHILE: usize = 16;
/// Pieces with fewer pages than this between them are one.
const GAP: usize = 8;
/// A file's part is taken whole where one in so many of its pages is used, and else not at all.
const USED: usize = 3;
/// So much is moved at one time, and is there twice meanwhile. No piece is longer.
const BATCH: usize = 16 * LARGE;
/// Came with Linux 6.1. It asks for large pages once, whatever the system's setting for them is, and leaves no
/// wish for more behind.
const MADV_COLLAPSE: usize = 25;

/// A range of this process's memory that is to be replaced.
#[derive(Debug)]
struct Piece {
    start: usize,
    length: usize,
    protection: c_int,
}

/// Moves the memory that this process uses into large pages. To be called with one thread.
///
/// # Errors
/// No large page can be had, or no more of them; the rest is as it was.
pub(crate) fn gather() -> io::Result<()> {
    // SAFETY: the call takes a number.
    if usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) != Ok(PAGE) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // Room for all that follows, so that it does not change the memory that it looks at.
    let mut pieces = Vec::with_capacity(1024);
    let mut entries = vec![0; 8192];
    let pages = File::open("/proc/self/pagemap")?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    for (piece, anonymous) in maps.lines().filter_map(own_memory) {
        add_used(piece, anonymous, &pages, &mut entries, &mut pieces)?;
    }

    let mut rest = &pieces[..];
    while !rest.is_empty() {
        let mut total = 0;
        let fits = |piece: &&Piece| {
            total += piece.length;
            total <= BATCH
        };
        let (batch, others) = rest.split_at(rest.iter().take_while(fits).count());
        relocate(batch)?;
        rest = others;
    }
    Ok(())
}

/// Moves these pieces. Nothing may be written to any of them meanwhile, so this knows the stack and the new
/// memory alone.
fn relocate(pieces: &[Piece]) -> io::Result<()> {
    let total: usize = pieces.iter().map(|piece| piece.length).sum();
    let size = total.next_multiple_of(LARGE);
    let room = map(size + LARGE)?;
    let large = room.next_multiple_of(LARGE);
    unmap(room, large - room);
    unmap(large + size, room + LARGE - large);

    let mut at = large;
    for piece in pieces {
        // SAFETY: the one is mapped and can be read, the other is new and has room for all pieces together.
        unsafe { core::ptr::copy_nonoverlapping(piece.start as *const u8, at as *mut u8, piece.length) };
        at += piece.length;
    }
    // SAFETY: the call changes no content.
    if let Err(errno) = unsafe { syscall(libc::SYS_madvise, [large, size, MADV_COLLAPSE, 0, 0]) } {
        unmap(large, size);
        return Err(io::Error::from_raw_os_error(errno));
    }
    let mut at = large;
    for piece in pieces {
        if replace(piece, at).is_err() {
            unmap(at, piece.length); // this one stays as it is
        }
        at += piece.length;
    }
    unmap(at, large + size - at);
    Ok(())
}

/// Lets the memory `at` take the place of the piece that it is a copy of.
fn replace(piece: &Piece, at: usize) -> Result<(), i32> {
    let &Piece { start, length, protection } = piece;
    let protection = protection.cast_unsigned() as usize;
    // SAFETY: the memory belongs to nobody but this module.
    unsafe { syscall(libc::SYS_mprotect, [at, length, protection, 0, 0]) }?;
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED).cast_unsigned() as usize;
    // SAFETY: what is replaced has the same content and the same protection.
    unsafe { syscall(libc::SYS_mremap, [at, length, length, flags, start]) }.map(drop)
}

/// A private mapping, from a line of `/proc/self/maps`, and whether it belongs to no file.
fn own_memory(line: &str) -> Option<(Piece, bool)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let protection = match words.next()? {
        "rw-p" => libc::PROT_READ | libc::PROT_WRITE,
        "r--p" => libc::PROT_READ,
        "r-xp" => libc::PROT_READ | libc::PROT_EXEC,
        _ => return None,
    };
    let anonymous = words.nth(2)? == "0";
    // The stack is in use, and the kernel has pages of its own.
    if words.next().is_some_and(|name| name.starts_with('[') && name != "[heap]") {
        return None;
    }
    let start = usize::from_str_radix(start, 16).ok()?;
    let length = usize::from_str_radix(end, 16).ok()?.checked_sub(start)?;
    Some((Piece { start, length, protection }, anonymous))
}

/// Adds what is used of a mapping.
fn add_used(
    whole: Piece,
    anonymous: bool,
    pages: &File,
    entries: &mut [u8],
    pieces: &mut Vec<Piece>,
) -> io::Result<()> {
    let (first, count) = (whole.start / PAGE, whole.length / PAGE);
    let Piece { protection, .. } = whole;
    let mut used = 0;
    // First and last page of what may become a piece.
    let mut run: Option<(usize, usize)> = None;
    let mut add = |(from, to): (usize, usize)| {
        if to - from + 1 >= WORTHWHILE {
            for start in (from..=to).step_by(BATCH / PAGE) {
                let length = ((to - start + 1) * PAGE).min(BATCH);
                pieces.push(Piece { start: start * PAGE, length, protection });
            }
        }
    };
    for from in (0..count).step_by(entries.len() / size_of::<u64>()) {
        let bytes = ((count - from) * size_of::<u64>()).min(entries.len());
        pages.read_exact_at(&mut entries[..bytes], ((first + from) * size_of::<u64>()) as u64)?;
        for (at, entry) in entries[..bytes].chunks_exact(size_of::<u64>()).enumerate() {
            // The highest bit of an entry tells that the page is there.
            if entry[size_of::<u64>() - 1] & 0x80 == 0 {
                continue;
            }
            let page = first + from + at;
            used += 1;
            run = match run {
                Some((start, last)) if page - last <= GAP => Some((start, page)),
                other => {
                    other.filter(|_| anonymous).map(&mut add);
                    Some((page, page))
                }
            };
        }
    }
    if anonymous {
        run.map(add);
    } else if used >= WORTHWHILE && used * USED >= count && whole.length <= BATCH {
        pieces.push(whole);
    }
    Ok(())
}

fn map(size: usize) -> io::Result<usize> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, wherever there is room.
    let at = unsafe { libc::mmap(core::ptr::null_mut(), size, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at as usize) }
}

/// Gives back a part of what [`map`] gave.
fn unmap(at: usize, size: usize) {
    if size > 0 {
        // SAFETY: nobody else knows of that memory.
        unsafe { libc::munmap(at as *mut _, size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `/proc/kpageflags`.
    const KPF_THP: u64 = 1 << 22;

    fn number(path: &str, at: usize) -> u64 {
        let mut bytes = [0; 8];
        File::open(path).unwrap().read_exact_at(&mut bytes, at as u64 * 8).unwrap();
        u64::from_ne_bytes(bytes)
    }

    fn is_large(address: usize) -> bool {
        let entry = number("/proc/self/pagemap", address / PAGE);
        let frame = entry & ((1 << 55) - 1);
        assert!(frame != 0, "only root is told where a page is");
        number("/proc/kpageflags", usize::try_from(frame).unwrap()) & KPF_THP != 0
    }

    /// Runs it in a process with one thread.
    fn alone(test: fn()) {
        // SAFETY: the child runs the test and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let passed = std::panic::catch_unwind(test).is_ok();
            // SAFETY: the call takes a number.
            unsafe { libc::_exit(c_int::from(!passed)) };
        }
        let mut status = -1;
        // SAFETY: the variable is live.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the child failed");
    }

    #[test]
    fn memory_keeps_its_content_and_its_place_in_large_pages() {
        alone(|| {
            // More than a batch, and with a hole that takes no memory.
            let mut large = vec![0_u64; (BATCH + 5 * LARGE) / 8];
            let (hole, middle) = (1 << 20, 1 << 19);
            for at in (0..large.len()).filter(|at| !(middle..middle + hole).contains(at)) {
                large[at] = at as u64 * 0x9e37_79b9;
            }
            let small: Vec<String> = (0..100_000).map(|number| number.to_string()).collect();
            gather().unwrap();

            for (at, word) in large.iter().enumerate() {
                let hollow = (middle..middle + hole).contains(&at);
                let expected = if hollow { 0 } else { at as u64 * 0x9e37_79b9 };
                if at % 512 == 0 && !hollow {
                    assert!(is_large(&raw const *word as usize), "page of {at}");
                }
                assert_eq!(*word, expected);
            }
            assert!(small.iter().enumerate().all(|(at, text)| *text == at.to_string()));
            assert!(is_large(&raw const small[50_000] as usize));
            // Memory goes on to be had and to be given back.
            large.extend_from_within(..);
            drop((large, small));
            assert_eq!((0..100_000).map(|number| vec![number]).collect::<Vec<_>>()[99_999], [99_999]);
        });
    }

    #[test]
    fn only_private_memory_is_taken() {
        let piece =
            |line| own_memory(line).map(|(piece, anonymous)| (piece.start, piece.protection, anonymous));
        let both = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(piece("1000-3000 rw-p 00000000 00:00 0 "), Some((0x1000, both, true)));
        assert_eq!(piece("1000-3000 rw-p 00000000 00:00 0    [heap]"), Some((0x1000, both, true)));
        assert_eq!(
            piece("1000-3000 r--p 0000a000 fe:00 17   /a [b]"),
            Some((0x1000, libc::PROT_READ, false))
        );
        for line in [
            "1000-3000 rw-s 00000000 00:01 12  /dev/zero (deleted)",
            "1000-3000 rwxp 00000000 00:00 0 ",
            "1000-3000 ---p 00000000 00:00 0 ",
            "1000-3000 rw-p 00000000 00:00 0   [stack]",
            "1000-3000 r-xp 00000000 00:00 0   [vdso]",
            "",
        ] {
            assert_eq!(piece(line), None, "{line}");
        }
    }
}

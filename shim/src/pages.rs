//! A zygote's memory in large pages.
//!
//! Every fork copies the zygote's page tables, every job comes to the pages of python's own code and constants
//! anew, and the end of every job takes all of that apart. What the kernel does there for each page it does but
//! once for all neighbours that are parts of one large page, and memory that belongs to no file is there after a
//! fork. So what a zygote uses is copied into large pages, which are then moved, piece by piece, to the
//! addresses of what they replace. A job that writes to one of these pages gets a copy of its 4 KiB alone, as
//! before.

use core::ffi::c_int;
use std::fs::File;
use std::io::{self, Read as _};
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

/// Flags of mappings that the memory in their place would not have: wiped at a fork (`MADV_WIPEONFORK`), kept from the
/// child (`MADV_DONTFORK`), locked (`mlock`), a shadow stack.
const FLAGS_TO_KEEP: [&str; 4] = ["wf", "dc", "lo", "ss"];
/// Room for the description of more mappings than pythons have, of which each takes about 700 bytes.
const DESCRIPTION: usize = 4 << 20;

/// A range of this process's memory that is to be replaced.
#[derive(Debug)]
struct Piece {
    start: usize,
    length: usize,
    protection: c_int,
}

/// Moves the memory that this process uses into large pages. To be called with one thread and all signals blocked.
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
    let mut smaps = String::with_capacity(DESCRIPTION);
    File::open("/proc/self/smaps")?.read_to_string(&mut smaps)?;
    for (piece, anonymous) in own_memory(&smaps) {
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

/// The private mappings that may be replaced, and whether each belongs to no file.
///
/// `smaps` is `/proc/self/smaps`: for each mapping its line of `/proc/self/maps`, then facts by name, the last of which
/// are its flags.
fn own_memory(smaps: &str) -> impl Iterator<Item = (Piece, bool)> {
    let mut described = None;
    smaps.lines().filter_map(move |line| {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let kept = |flag| FLAGS_TO_KEEP.contains(&flag);
            return described.take().filter(|_| !flags.split_ascii_whitespace().any(kept));
        }
        if line.starts_with(|first: char| first.is_ascii_digit() || first.is_ascii_lowercase()) {
            described = mapping(line);
        }
        None
    })
}

/// A private mapping, from its line, and whether it belongs to no file.
fn mapping(line: &str) -> Option<(Piece, bool)> {
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

    /// The flags of the mapping that holds `address`, as the kernel lists them.
    fn flags(address: usize) -> String {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in smaps.lines() {
            match (line.strip_prefix("VmFlags:"), mapping(line)) {
                (Some(flags), _) if inside => return format!("{flags} "),
                (_, Some((piece, _))) => {
                    inside = (piece.start..piece.start + piece.length).contains(&address);
                }
                _ => {}
            }
        }
        panic!("nothing is mapped there");
    }

    #[test]
    fn memory_with_flags_of_its_own_keeps_them() {
        alone(|| {
            const SIZE: usize = 4 * WORTHWHILE * PAGE;
            // SAFETY: the address and the length are those of a mapping of this test.
            let advise = |at: usize, advice| unsafe { libc::madvise(at as *mut _, SIZE, advice) };
            // SAFETY: as above.
            let lock = |at: usize| unsafe { libc::mlock(at as *const _, SIZE) };
            let [plain, wiped, kept_back, locked] = [(); 4].map(|()| map(SIZE).unwrap());
            assert_eq!(advise(wiped, libc::MADV_WIPEONFORK), 0);
            assert_eq!(advise(kept_back, libc::MADV_DONTFORK), 0);
            assert_eq!(lock(locked), 0);
            for at in [plain, wiped, kept_back, locked] {
                // SAFETY: it is mapped, writable and as long as that.
                unsafe { core::ptr::write_bytes(at as *mut u8, 7, SIZE) };
            }
            gather().unwrap();

            assert!(is_large(plain), "a mapping of this size is worth it");
            for (at, flag) in [(wiped, " wf "), (kept_back, " dc "), (locked, " lo ")] {
                let flags = flags(at);
                assert!(flags.contains(flag) && !is_large(at), "{flag}: {flags}");
            }
            // SAFETY: the child reads memory and ends.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: it is mapped, and stays so in a child.
                let first = unsafe { (wiped as *const u8).read_volatile() };
                // SAFETY: the call takes a number.
                unsafe { libc::_exit(c_int::from(first)) };
            }
            let mut status = -1;
            // SAFETY: the variable is live.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(status, 0, "a child must not see what is wiped at a fork");
        });
    }

    #[test]
    fn only_private_memory_is_taken() {
        let piece = |line| mapping(line).map(|(piece, anonymous)| (piece.start, piece.protection, anonymous));
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

//! Descriptors: pipes, sockets, sealed memory files, and those that arrive over a socket.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};

/// Descriptors handed to a new process are kept from this number on, clear of the numbers that they become.
const LOWEST_KEPT: RawFd = 32;

/// A pipe, reading end first; neither end crosses an exec.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(OFlag::O_CLOEXEC)?)
}

/// A pipe whose ends a user may open again, as `/proc/self/fd` has them; where none is named, this process's own.
pub fn pipe_of(owner: Option<u32>) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe()?;
    if let Some(owner) = owner {
        // Both ends are one file.
        std::os::unix::fs::fchown(&read, Some(owner), Some(owner))?;
    }
    Ok((read, write))
}

/// A connected pair of stream sockets; neither crosses an exec.
pub fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?)
}

/// A connected pair of sockets that keep messages apart; neither crosses an exec.
pub fn message_socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Sends one message with descriptors beside it.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let beside = [ControlMessage::ScmRights(fds)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &beside, flags, None)?;
    Ok(())
}

/// Makes reads and writes return instead of waiting.
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// The same descriptor under a number that no new process uses for itself.
pub fn out_of_the_way(fd: impl AsFd) -> io::Result<OwnedFd> {
    let number = fcntl(fd.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(LOWEST_KEPT))?;
    // SAFETY: the call has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A file in memory that can never change again, open at its beginning.
///
/// Sealed, because what a process gets of it would otherwise be shared memory with the worker.
pub fn sealed_file(name: &std::ffi::CStr, content: &[u8]) -> io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create(name, flags)?);
    file.write_all(content)?;
    let seals =
        SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    io::Seek::rewind(&mut file)?;
    Ok(file.into())
}

/// Lets this process have as many files open as it may have at all: every job takes a few of them.
pub fn allow_more() -> io::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}

/// What one `recvmsg` brought.
#[derive(Debug)]
pub struct Received {
    /// Bytes read; 0 at the end.
    pub length: usize,
    /// The descriptors that came along, in the order in which they were sent.
    pub fds: Vec<OwnedFd>,
}

/// Reads bytes, and the descriptors that travel with them.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    // Room for more than any honest peer sends. The kernel itself closes what does not find room.
    let mut space = nix::cmsg_space!([RawFd; 8]);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let length = message.bytes;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            for number in numbers {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
                fds.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    Ok(Received { length, fds })
}

//! Sends a report to the worker, and descriptors beside it.

use core::ffi::c_int;

use crate::abi::{REPORT_LEN, Report};
use crate::sys::{self, Errno};

/// Most descriptors that travel with a report.
const MOST: usize = 2;

/// Sends the report in one message, with the descriptors beside it. They stay open here.
pub(crate) fn send(socket: c_int, report: Report, fds: &[c_int]) -> Result<(), Errno> {
    let mut bytes: [u8; REPORT_LEN] = report.encode();
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // A control message's header of 16 bytes and the numbers, in the alignment that it needs.
    let mut control = [0_u64; 2 + MOST.div_ceil(2)];
    // SAFETY: `msghdr` is plain numbers and pointers: all zero is a value of it.
    let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        let size = u32::try_from(size_of_val(fds)).map_err(|_| libc::EINVAL)?;
        // SAFETY: pure arithmetic.
        let (space, length) = unsafe { (libc::CMSG_SPACE(size), libc::CMSG_LEN(size)) };
        if space as usize > size_of_val(&control) {
            return Err(libc::EINVAL);
        }
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = space as _;
        // SAFETY: the control buffer is live and, as just checked, holds the header and every number.
        unsafe {
            let head = libc::CMSG_FIRSTHDR(&raw const message);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = length as _;
            libc::CMSG_DATA(head).cast::<c_int>().copy_from_nonoverlapping(fds.as_ptr(), fds.len());
        }
    }
    // SAFETY: every pointer in the message is live until the call returns.
    let sent = unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(sys::errno()) } else { Ok(()) }
}

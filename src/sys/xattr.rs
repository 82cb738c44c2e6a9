//! Extended attributes of files.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Whether a file has an attribute of this name, whatever its value. No, where it may not be asked.
pub fn is_set(path: &Path, name: &CStr) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: both strings end in NUL and outlive the call; with a size of 0 nothing is written.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) };
    length >= 0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

    use super::*;

    #[test]
    fn an_attribute_is_there_once_it_was_set() {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let path = CString::new(file.path().as_os_str().as_bytes()).unwrap();
        let name = c"trusted.sandpiper";
        assert!(!is_set(file.path(), name));
        // SAFETY: both strings end in NUL, and the value has the length that is given.
        let set = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), c"1".as_ptr().cast(), 1, 0) };
        // Only root may set such a one.
        assert_eq!(is_set(file.path(), name), set == 0);
        assert!(!is_set(Path::new("/nowhere/at/all"), name));
    }
}

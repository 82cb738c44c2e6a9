//! Names of signals, and their numbers.

use std::str::FromStr;

use nix::sys::signal::Signal;

/// The number behind `SIGSEGV` or `SIGRTMIN+3`, where there is such a signal.
pub fn number(name: &str) -> Option<i32> {
    if let Some(real_time) = name.strip_prefix("SIGRTMIN") {
        let offset: i32 = if real_time.is_empty() { 0 } else { real_time.parse().ok()? };
        let number = libc::SIGRTMIN().checked_add(offset)?;
        return (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&number).then_some(number);
    }
    Signal::from_str(name).ok().map(|signal| signal as i32)
}

/// `SIGSEGV`, `SIGRTMIN+3`; `SIG32` where a number has no name.
pub fn name(number: i32) -> String {
    if let Ok(signal) = Signal::try_from(number) {
        return signal.as_str().to_owned();
    }
    match number.checked_sub(libc::SIGRTMIN()) {
        Some(0) => "SIGRTMIN".to_owned(),
        Some(offset) if offset > 0 && number <= libc::SIGRTMAX() => format!("SIGRTMIN+{offset}"),
        _ => format!("SIG{number}"),
    }
}

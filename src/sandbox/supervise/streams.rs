//! The pipes between the worker and a job: what comes out is counted as it is read, what goes in never blocks.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

use crate::job::{Captured, Stream};
use crate::sandbox::supervise::live_output::Tap;
use crate::sys::{fd, ready};

/// Bytes taken in one read: a pipe's own size.
const CHUNK: usize = 64 << 10;
/// In the first one. Most jobs write less, and room that is not needed has to be cleared all the same.
const FIRST_CHUNK: usize = 4 << 10;

/// One stream of output, up to a limit. Past that nothing more is read: a flood costs a fixed amount of memory.
#[derive(Debug)]
pub(in crate::sandbox) struct Output {
    pipe: AsyncFd<File>,
    bytes: Vec<u8>,
    state: State,
    tap: Option<(Tap, Stream)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Ended,
    Over,
}

impl Output {
    pub(in crate::sandbox) fn new(pipe: OwnedFd) -> io::Result<Self> {
        fd::set_nonblocking(&pipe)?;
        let pipe = ready::readable(File::from(pipe))?;
        Ok(Self { pipe, bytes: Vec::new(), state: State::Open, tap: None })
    }

    /// From now on whoever holds the tap sees the output as it is read, and first what came before.
    pub(in crate::sandbox) fn tap(&mut self, tap: Option<Tap>, stream: Stream) {
        self.tap = tap.map(|tap| (tap, stream));
        self.show(0);
    }

    /// There may be more to come.
    pub(in crate::sandbox) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// More was written than the limit allows.
    pub(in crate::sandbox) fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Waits for output, and takes it.
    pub(in crate::sandbox) async fn fill(&mut self, limit: u64) {
        let held = self.bytes.len();
        match self.pipe.readable().await {
            Ok(mut ready) => {
                let read = take(ready.get_inner(), &mut self.bytes, limit);
                match read {
                    Ok(state) => self.state = state,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                    Err(_) => self.state = State::Ended,
                }
            }
            Err(_) => self.state = State::Ended,
        }
        self.show(held);
    }

    /// Passes on what came after the first `held` bytes.
    fn show(&self, held: usize) {
        if let Some((tap, stream)) = &self.tap {
            tap.add(*stream, &self.bytes[held..]);
        }
    }

    /// Takes what is left once every writer is dead.
    pub(in crate::sandbox) fn finish(&mut self, limit: u64) -> Captured {
        let held = self.bytes.len();
        while self.state == State::Open {
            self.state = take(self.pipe.get_ref(), &mut self.bytes, limit).unwrap_or(State::Ended);
        }
        self.show(held);
        Captured { bytes: std::mem::take(&mut self.bytes), truncated: self.state == State::Over }
    }
}

/// One read. The byte after the limit is what tells "exactly" from "more".
fn take(mut pipe: &File, bytes: &mut Vec<u8>, limit: u64) -> io::Result<State> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let held = bytes.len();
    let chunk = if held == 0 { FIRST_CHUNK } else { CHUNK };
    let room = limit.saturating_sub(held).saturating_add(1).min(chunk);
    bytes.resize(held + room, 0);
    let read = loop {
        match pipe.read(&mut bytes[held..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other,
        }
    };
    bytes.truncate(held + *read.as_ref().unwrap_or(&0));
    if read? == 0 {
        return Ok(State::Ended);
    }
    if bytes.len() > limit {
        bytes.truncate(limit);
        return Ok(State::Over);
    }
    Ok(State::Open)
}

/// Bytes on their way into a job. Whoever does not read them, or has closed the other end, ends it quietly.
#[derive(Debug)]
pub(in crate::sandbox) struct Input {
    pipe: Option<AsyncFd<File>>,
    bytes: Vec<u8>,
    sent: usize,
}

impl Input {
    /// Sends at once what fits, which is all of it in most cases.
    pub(in crate::sandbox) fn new(pipe: OwnedFd, bytes: Vec<u8>) -> io::Result<Self> {
        fd::set_nonblocking(&pipe)?;
        let (pipe, mut sent) = (File::from(pipe), 0);
        if push(&pipe, &bytes, &mut sent) {
            return Ok(Self { pipe: None, bytes: Vec::new(), sent });
        }
        Ok(Self { pipe: Some(ready::writable(pipe)?), bytes, sent })
    }

    /// There is more to send.
    pub(in crate::sandbox) fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    /// Waits for room, and sends what fits; the pipe is closed behind the last byte.
    pub(in crate::sandbox) async fn send(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        let done = match pipe.writable().await {
            Ok(mut ready) => {
                let done = push(ready.get_inner(), &self.bytes, &mut self.sent);
                if !done {
                    ready.clear_ready();
                }
                done
            }
            Err(_) => true,
        };
        if done {
            self.pipe = None;
            self.bytes = Vec::new();
        }
    }
}

/// Writes until there is no room. True where nothing is left to do: all is sent, or nobody reads it.
fn push(mut pipe: &File, bytes: &[u8], sent: &mut usize) -> bool {
    while *sent < bytes.len() {
        match pipe.write(&bytes[*sent..]) {
            Ok(more) => *sent += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    async fn captured(written: usize, limit: u64) -> Captured {
        let (read, write) = fd::pipe().unwrap();
        let mut output = Output::new(read).unwrap();
        let writer = std::thread::spawn(move || {
            // The reader stops at the limit, and then the pipe breaks.
            let _ = File::from(write).write_all(&vec![b'x'; written]);
        });
        while output.is_open() {
            output.fill(limit).await;
        }
        let captured = output.finish(limit);
        writer.join().unwrap();
        captured
    }

    #[tokio::test]
    async fn exactly_the_limit_is_no_overflow() {
        for limit in [0, 1, 100, 65_536, 200_000] {
            let size = usize::try_from(limit).unwrap();
            assert_eq!(captured(size, limit).await, Captured { bytes: vec![b'x'; size], truncated: false });
            let over = captured(size + 1, limit).await;
            assert_eq!((over.bytes.len(), over.truncated), (size, true));
        }
    }

    #[tokio::test]
    async fn input_that_nobody_reads_ends() {
        let (read, write) = fd::pipe().unwrap();
        let mut input = Input::new(write, vec![0; 1 << 20]).unwrap();
        drop(read);
        while input.is_open() {
            input.send().await;
        }
    }
}

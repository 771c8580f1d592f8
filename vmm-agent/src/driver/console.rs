//! The last bytes of a guest's console and of its VMM's own messages.
//!
//! They come through a pipe, not a file: a guest may write as much as it likes to its serial port, and must not fill
//! the host's disk with it. The VMM's end does not block, and breaks when the agent ends: then nobody reads, and
//! the VM runs on all the same.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::{io::AsyncReadExt as _, net::unix::pipe, task::JoinHandle};

/// What is kept of it, bytes.
const KEPT: usize = 16 << 10;
/// What the log shows of it.
const LINES: usize = 20;

/// Reads a console until it is dropped.
#[derive(Debug)]
pub struct Console {
    tail: Arc<Mutex<VecDeque<u8>>>,
    reader: JoinHandle<()>,
}

impl Console {
    /// A console, and the end of its pipe that is for the VMM.
    ///
    /// # Errors
    ///
    /// If there can be no more pipes.
    pub fn open() -> io::Result<(Self, OwnedFd)> {
        let (writer, reader) = {
            let (sender, receiver) = pipe::pipe()?;
            (sender.into_nonblocking_fd()?, receiver)
        };
        tracing::trace!(fd = writer.as_raw_fd(), "console");
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let reader = tokio::spawn(read(reader, tail.clone()));
        Ok((Self { tail, reader }, writer))
    }

    /// Its last lines.
    pub fn tail(&self) -> String {
        let bytes: Vec<u8> = self.tail.lock().iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn read(mut pipe: pipe::Receiver, tail: Arc<Mutex<VecDeque<u8>>>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        let mut tail = tail.lock();
        tail.extend(&buffer[..count]);
        let surplus = tail.len().saturating_sub(KEPT);
        tail.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _, time::Duration};

    use super::*;

    #[tokio::test]
    async fn keeps_the_last_lines_and_no_more() {
        let (console, writer) = Console::open().unwrap();
        let mut writer = File::from(writer);
        for line in 0..2000 {
            while writeln!(writer, "line {line}").is_err() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        tokio::time::timeout(Duration::from_secs(60), async {
            while !console.tail().ends_with("line 1999") {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .unwrap();
        assert_eq!(console.tail().lines().count(), LINES);
        assert!(console.tail.lock().len() <= KEPT);
    }
}

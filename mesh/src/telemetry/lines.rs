//! Lines of a log, which are written together.
//!
//! A line for each request is a system call for each, during which all other threads that log wait: a twentieth of what a small
//! request takes. So lines are put aside, and written by a thread of their own, [`LATE`] after the first of them, or once those before are
//! written. A process that is killed loses those; what a panic says does not come by this way.

use std::{
    fmt,
    io::{self, Write},
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};

/// How late a line may be written.
const LATE: Duration = Duration::from_millis(10);
/// Bytes that may be put aside. Who logs more writes, too, and waits for its turn to. With sixteen times as much a gateway under load had
/// requests that were as late.
const MOST: usize = 256 << 10;

/// Where lines are put aside. Clones are the same.
#[derive(Clone)]
pub struct Lines(Arc<Shared>);

struct Shared {
    /// Locked before `aside` by who writes, and while it does: whoever logs meanwhile waits for nobody.
    to: Mutex<To>,
    aside: Mutex<Aside>,
    changed: Condvar,
}

struct To {
    writer: Box<dyn Write + Send>,
    /// Room for the next lines: what was written last.
    room: Vec<u8>,
}

struct Aside {
    lines: Vec<u8>,
    /// Whether somebody writes them: before and after that, lines are written at once.
    has_writer: bool,
}

impl fmt::Debug for Lines {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Lines").finish_non_exhaustive()
    }
}

impl Lines {
    /// To this, at once until they are [started](Self::start).
    pub fn to(to: impl Write + Send + 'static) -> Self {
        let aside = Mutex::new(Aside { lines: Vec::new(), has_writer: false });
        let to = Mutex::new(To { writer: Box::new(to), room: Vec::new() });
        Self(Arc::new(Shared { to, aside, changed: Condvar::new() }))
    }

    /// Starts the thread that writes them, if the system permits.
    pub fn start(&self) {
        let lines = self.clone();
        // It is there when the thread first looks.
        self.0.aside.lock().has_writer = true;
        if thread::Builder::new().name("log".to_owned()).spawn(move || lines.write_on()).is_err() {
            self.end();
        }
    }

    /// Writes what is put aside, and from then on each line at once.
    pub fn end(&self) {
        self.0.aside.lock().has_writer = false;
        // Nobody can be told that a log cannot be written.
        let _ = self.write_aside();
        self.0.changed.notify_all();
    }

    fn write_on(&self) {
        loop {
            let mut aside = self.0.aside.lock();
            while aside.lines.is_empty() && aside.has_writer {
                self.0.changed.wait(&mut aside);
            }
            if !aside.has_writer {
                return;
            }
            // More may come meanwhile, which wakes nobody.
            self.0.changed.wait_for(&mut aside, LATE);
            drop(aside);
            let _ = self.write_aside();
        }
    }

    /// Writes what is put aside, after what was put aside before.
    fn write_aside(&self) -> io::Result<()> {
        let To { writer, room } = &mut *self.0.to.lock();
        room.clear();
        std::mem::swap(room, &mut self.0.aside.lock().lines);
        writer.write_all(room)
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut aside = self.0.aside.lock();
        let is_first = aside.lines.is_empty();
        aside.lines.extend_from_slice(line);
        let is_due = !aside.has_writer || aside.lines.len() >= MOST;
        drop(aside);
        if is_due {
            self.write_aside()?;
        } else if is_first {
            self.0.changed.notify_one();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Tells what is written, write by write.
    struct Told(Sender<String>);

    impl Write for Told {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if !bytes.is_empty() {
                let _ = self.0.send(String::from_utf8_lossy(bytes).into_owned());
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines() -> (Lines, Receiver<String>) {
        let (sender, receiver) = channel();
        (Lines::to(Told(sender)), receiver)
    }

    #[test]
    fn lines_are_written_together_and_none_is_lost() {
        let (lines, told) = lines();
        let mut log = lines.clone();
        log.write_all(b"at once\n").unwrap();
        assert_eq!(told.try_recv().unwrap(), "at once\n");
        lines.start();
        for number in 0..1000 {
            writeln!(log, "{number}").unwrap();
        }
        log.write_all(b"last\n").unwrap();
        let mut all = String::new();
        let mut writes = 0;
        while !all.ends_with("last\n") {
            all.push_str(&told.recv_timeout(Duration::from_secs(20)).unwrap());
            writes += 1;
        }
        let numbers: String = (0..1000).map(|number| format!("{number}\n")).collect();
        assert_eq!(all, numbers + "last\n");
        assert!(writes < 500, "{writes} writes of 1001 lines");
        log.write_all(b"waits\n").unwrap();
        lines.end();
        assert_eq!(told.recv_timeout(Duration::from_secs(20)).unwrap(), "waits\n");
        log.write_all(b"after\n").unwrap();
        assert_eq!(told.try_recv().unwrap(), "after\n");
    }

    #[test]
    fn no_more_is_put_aside_than_there_is_room_for() {
        let (lines, told) = lines();
        lines.start();
        let mut log = lines.clone();
        log.write_all(&vec![b'x'; MOST]).unwrap();
        // Written by who logged it: there is nothing left of it.
        assert_eq!(told.try_iter().map(|written| written.len()).sum::<usize>(), MOST);
        lines.end();
    }
}

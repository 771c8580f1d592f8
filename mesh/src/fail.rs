//! Fail points: named places amid an operation at which a test has a service die, or the operation fail.
//!
//! A service has them if `OC_FAIL_POINTS` in its environment names a file, and never otherwise: passing one is a load of an
//! atomic then, and they stand only where something slow was just done. While there is such a file, it holds one line:
//!
//! ```text
//!   POINT=kill       this process is killed
//!   POINT=kill-vmm   the VMM of the microVM at hand is
//!   POINT=fail       the operation meets an error
//!   POINT=pause      it waits until nobody else has a lock (flock) on the file
//! ```
//!
//! Whoever passes the point first renames the file to `FILE.passed` and does that. So it is done once, whatever is started
//! again afterwards, and who waits for it sees that it is.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::OnceLock,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tracing::{error, warn};

/// Names the file.
pub const VARIABLE: &str = "OC_FAIL_POINTS";

static ARMED: OnceLock<Armed> = OnceLock::new();

/// A place in a service's code, called `SERVICE.OPERATION.STEP`, by the step that was just done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point(&'static str);

impl Point {
    /// The point called `name`; see [`fail_points`](crate::fail_points).
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// What it is called.
    pub const fn name(self) -> &'static str {
        self.0
    }
}

/// Declares the fail points of a service, and `ALL` of them.
#[macro_export]
macro_rules! fail_points {
    ($($(#[$doc:meta])+ $point:ident = $name:literal;)+) => {
        $($(#[$doc])+ pub const $point: $crate::fail::Point = $crate::fail::Point::new($name);)+

        /// All of them.
        pub const ALL: &[$crate::fail::Point] = &[$($point),+];
    };
}

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// This process is killed.
    Kill,
    /// The VMM of the microVM at hand is.
    KillVmm,
    /// The operation meets an error.
    Fail,
    /// It waits until nobody else has a lock on the file.
    Pause,
}

impl FromStr for Action {
    type Err = FailError;

    fn from_str(text: &str) -> Result<Self, FailError> {
        match text {
            "kill" => Ok(Self::Kill),
            "kill-vmm" => Ok(Self::KillVmm),
            "fail" => Ok(Self::Fail),
            "pause" => Ok(Self::Pause),
            other => Err(FailError::NoAction(other.into())),
        }
    }
}

/// What is wrong with the file.
#[derive(Debug, thiserror::Error)]
pub enum FailError {
    /// It holds something else.
    #[error("{0:?} is not POINT=ACTION")]
    NoLine(String),
    /// There is no such point.
    #[error("there is no fail point {0:?}")]
    NoPoint(String),
    /// There is no such action, or this service has none.
    #[error("there is no action {0:?} here")]
    NoAction(String),
    /// It cannot be read.
    #[error("cannot read the file that {VARIABLE} names")]
    Unreadable(#[source] io::Error),
}

/// The error that an operation meets at a point.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("it fails at {}, as it was told to", .0.name())]
pub struct Failed(pub Point);

impl From<Failed> for io::Error {
    fn from(failed: Failed) -> Self {
        Self::other(failed)
    }
}

#[derive(Debug)]
struct Armed {
    file: PathBuf,
    points: &'static [Point],
    actions: &'static [Action],
}

/// Arms a service's points, which know these actions, if its environment says so. Called once, when it starts.
///
/// # Errors
///
/// [`FailError`]: what the file holds is of this service, and makes no sense.
pub fn arm(points: &'static [Point], actions: &'static [Action]) -> Result<(), FailError> {
    let Some(file) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) else { return Ok(()) };
    let armed = Armed { file: file.into(), points, actions };
    armed.read()?;
    warn!(file = %armed.file.display(), "fail points are on: this service dies where that file says");
    let _ = ARMED.set(armed);
    Ok(())
}

/// Passes a point. Being killed and pausing happen here; what else there is to do is told: `None` nearly always.
#[must_use]
pub fn pass(point: Point) -> Option<Action> {
    ARMED.get()?.pass(point)
}

impl Armed {
    /// What the file says, if it is there and about this service.
    fn read(&self) -> Result<Option<(Point, Action)>, FailError> {
        let text = match fs::read_to_string(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(FailError::Unreadable)?,
        };
        let line = text.trim_end();
        let (name, action) = line.split_once('=').ok_or_else(|| FailError::NoLine(line.into()))?;
        let service = |name: &str| name.split_once('.').map(|(service, _)| service.to_owned());
        if !self.points.iter().any(|point| service(point.0) == service(name)) {
            return Ok(None);
        }
        let point = self.points.iter().find(|point| point.0 == name);
        let point = *point.ok_or_else(|| FailError::NoPoint(name.into()))?;
        let action = action.parse()?;
        match self.actions.contains(&action) {
            true => Ok(Some((point, action))),
            false => Err(FailError::NoAction(format!("{action:?}"))),
        }
    }

    fn pass(&self, point: Point) -> Option<Action> {
        let action = match self.read() {
            Ok(Some((wanted, action))) if wanted == point => action,
            Ok(_) => return None,
            Err(error) => {
                error!(%error, "fail points");
                return None;
            }
        };
        let passed = passed(&self.file);
        // Another one may be here at the same moment.
        fs::rename(&self.file, &passed).ok()?;
        warn!(point = point.0, ?action, "a fail point is passed");
        match action {
            Action::Kill => {
                let _ = kill(Pid::this(), Signal::SIGKILL);
                None
            }
            Action::Pause => {
                // Others of this process must go on.
                let waited =
                    tokio::task::block_in_place(|| File::open(&passed).and_then(|file| file.lock_shared()));
                if let Err(error) = waited {
                    error!(%error, "cannot pause at a fail point");
                }
                None
            }
            other => Some(other),
        }
    }
}

/// What the file is called once its point was passed.
pub fn passed(file: &Path) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(".passed");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fail_points! {
        /// One.
        ONE = "test.it.one";
        /// Another.
        TWO = "test.it.two";
    }

    fn armed(directory: &tempfile::TempDir) -> Armed {
        Armed { file: directory.path().join("point"), points: ALL, actions: &[Action::Fail, Action::Pause] }
    }

    #[test]
    fn a_point_is_passed_once() {
        let directory = tempfile::tempdir().unwrap();
        let armed = armed(&directory);
        assert_eq!(armed.pass(TWO), None, "there is no file");
        fs::write(&armed.file, "test.it.two=fail\n").unwrap();
        assert_eq!(armed.pass(ONE), None);
        assert_eq!(armed.pass(TWO), Some(Action::Fail));
        assert!(passed(&armed.file).exists() && !armed.file.exists());
        assert_eq!(armed.pass(TWO), None);
    }

    #[test]
    fn what_makes_no_sense_is_told_and_what_is_of_another_service_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let armed = armed(&directory);
        for (line, error) in [
            ("test.it.two", "\"test.it.two\" is not POINT=ACTION"),
            ("test.it.three=fail", "there is no fail point \"test.it.three\""),
            ("test.it.two=burn", "there is no action \"burn\" here"),
            ("test.it.two=kill", "there is no action \"Kill\" here"),
        ] {
            fs::write(&armed.file, line).unwrap();
            assert_eq!(armed.read().unwrap_err().to_string(), error);
            assert_eq!(armed.pass(TWO), None, "{line}");
        }
        fs::write(&armed.file, "other.it.two=burn").unwrap();
        assert!(armed.read().unwrap().is_none());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_pause_ends_with_the_lock() {
        let directory = tempfile::tempdir().unwrap();
        let armed = armed(&directory);
        fs::write(&armed.file, "test.it.one=pause").unwrap();
        let (file, held) = (armed.file.clone(), File::open(&armed.file).unwrap());
        held.lock().unwrap();
        let pausing = tokio::task::spawn_blocking(move || armed.pass(ONE));
        while !passed(&file).exists() {
            tokio::task::yield_now().await;
        }
        assert!(!pausing.is_finished(), "it waits");
        drop(held);
        assert_eq!(pausing.await.unwrap(), None);
    }
}

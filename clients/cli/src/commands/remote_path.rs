//! Paths in a sandbox, as they are written on the command line: `ID:PATH`.

use std::path::{Path, PathBuf};

use crate::{arguments::RemotePath, failure::Failure};

/// A path in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InSandbox {
    /// ID of the sandbox.
    pub id: String,
    /// The path; the user's home where empty.
    pub path: String,
}

impl InSandbox {
    /// From `ID:PATH`, `ID PATH` or `ID`.
    pub fn new(target: &str, path: Option<&str>) -> Result<Self, Failure> {
        let (id, path) = match (path, target.split_once(':')) {
            (Some(path), None) => (target, path),
            (None, Some((id, path))) => (id, path),
            (None, None) => (target, ""),
            (Some(_), Some(_)) => {
                return Err(Failure::Usage(format!(
                    "{target:?} names a path already: give ID:PATH, or ID PATH"
                )));
            }
        };
        if id.is_empty() {
            return Err(Failure::Usage(format!("{target:?} names no sandbox: give ID:PATH")));
        }
        Ok(Self { id: id.to_owned(), path: path.to_owned() })
    }

    /// The same for what needs a path.
    pub fn with_path(target: &str, path: Option<&str>) -> Result<Self, Failure> {
        let place = Self::new(target, path)?;
        if place.path.is_empty() {
            return Err(Failure::Usage(format!("which path in {}? give ID:PATH", place.id)));
        }
        Ok(place)
    }

    /// The path for a call: the home has a name of its own.
    pub fn path_or_home(&self) -> String {
        if self.path.is_empty() { ".".to_owned() } else { self.path.clone() }
    }

    /// `name` in this directory.
    pub fn join(&self, name: &str) -> Self {
        let path = match self.path.trim_end_matches('/') {
            "" if self.path.is_empty() => name.to_owned(),
            directory => format!("{directory}/{name}"),
        };
        Self { id: self.id.clone(), path }
    }

    /// Last component, if it is a name.
    pub fn base_name(&self) -> Option<&str> {
        let name = self.path.trim_end_matches('/').rsplit('/').next()?;
        (!matches!(name, "" | "." | "..")).then_some(name)
    }
}

impl RemotePath {
    /// The place that the arguments name, the home if they name no path.
    pub fn place(&self) -> Result<InSandbox, Failure> {
        InSandbox::new(&self.target, self.path.as_deref())
    }

    /// The place that the arguments name.
    pub fn place_with_path(&self) -> Result<InSandbox, Failure> {
        InSandbox::with_path(&self.target, self.path.as_deref())
    }
}

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Side {
    /// `ID:PATH`.
    Sandbox(InSandbox),
    /// A path on this machine.
    Local(PathBuf),
    /// `-`: standard input or output.
    Standard,
}

impl Side {
    /// Tells the three apart. A name on this machine that looks like `ID:PATH` is written `./sb-…:…`.
    pub fn parse(text: &Path) -> Self {
        if text.as_os_str() == "-" {
            return Self::Standard;
        }
        // A path in a sandbox is text; one on this machine may be any bytes.
        match text.to_str().and_then(|text| text.split_once(':')) {
            Some((id, path)) if is_sandbox_id(id) => {
                Self::Sandbox(InSandbox { id: id.to_owned(), path: path.to_owned() })
            }
            _ => Self::Local(text.to_owned()),
        }
    }
}

fn is_sandbox_id(text: &str) -> bool {
    text.strip_prefix("sb-").is_some_and(|rest| {
        !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    })
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

    use super::*;

    fn sandbox(path: &str) -> InSandbox {
        InSandbox { id: "sb-1".into(), path: path.into() }
    }

    #[test]
    fn sides_are_told_apart() {
        for (text, side) in [
            ("-", Side::Standard),
            ("sb-1:/a b:c", Side::Sandbox(sandbox("/a b:c"))),
            ("sb-1:", Side::Sandbox(sandbox(""))),
            ("./sb-1:a", Side::Local("./sb-1:a".into())),
            ("C:file", Side::Local("C:file".into())),
            ("sb-:a", Side::Local("sb-:a".into())),
            ("/tmp/sb-1:a", Side::Local("/tmp/sb-1:a".into())),
            ("plain", Side::Local("plain".into())),
        ] {
            assert_eq!(Side::parse(Path::new(text)), side, "{text}");
        }
        let bytes = Path::new(OsStr::from_bytes(b"sb-1:\xff"));
        assert_eq!(Side::parse(bytes), Side::Local(bytes.to_owned()));
    }

    #[test]
    fn a_path_may_be_given_in_two_ways_but_only_once() {
        assert_eq!(InSandbox::new("sb-1:a:b", None).unwrap(), sandbox("a:b"));
        assert_eq!(InSandbox::new("sb-1", Some("a:b")).unwrap(), sandbox("a:b"));
        assert_eq!(InSandbox::new("sb-1", None).unwrap(), sandbox(""));
        assert!(InSandbox::new("sb-1:a", Some("b")).is_err());
        assert!(InSandbox::new(":a", None).is_err());
        assert!(InSandbox::with_path("sb-1", None).is_err());
        assert!(InSandbox::with_path("sb-1:", None).is_err());
    }

    #[test]
    fn names_are_joined_below_home_root_and_directories() {
        for (directory, joined) in [("", "n"), ("/", "/n"), ("a", "a/n"), ("/a/", "/a/n")] {
            assert_eq!(sandbox(directory).join("n").path, joined);
        }
    }

    #[test]
    fn base_names_are_names() {
        for (path, name) in
            [("/a/b", Some("b")), ("b/", Some("b")), ("", None), ("/", None), ("a/..", None), (".", None)]
        {
            assert_eq!(sandbox(path).base_name(), name, "{path}");
        }
    }
}

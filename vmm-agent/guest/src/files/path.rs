//! Paths as callers give them.

use std::path::{Component, Path, PathBuf};

use tonic::Status;

use crate::refusal::Refusal;

/// Where relative paths start.
const HOME: &str = "/home/sandbox";
/// `PATH_MAX` (limits.h) without its NUL.
const MAX_PATH: usize = 4095;
/// Where the kernel speaks of itself: what is there is no file.
const KERNELS: [&str; 2] = ["/proc", "/sys"];

/// Whether `directory` holds the kernel's own, which is neither watched nor packed.
pub fn is_kernels(directory: &Path) -> bool {
    KERNELS.iter().any(|kernels| Path::new(kernels) == directory)
}

/// An absolute path without `.`, `..` and empty components.
///
/// # Errors
///
/// `INVALID_PATH`.
pub fn resolve(path: &str) -> Result<PathBuf, Status> {
    let invalid = |text: &str| Err(Refusal::InvalidPath.status(text));
    if path.is_empty() {
        return invalid("the path is empty");
    }
    if path.len() > MAX_PATH {
        return invalid("the path is longer than 4095 bytes");
    }
    if path.contains('\0') {
        return invalid("the path has a NUL");
    }
    let mut resolved = PathBuf::from(HOME);
    for component in Path::new(path).components() {
        match component {
            Component::RootDir | Component::Prefix(_) => resolved = PathBuf::from("/"),
            Component::CurDir => {}
            Component::ParentDir => return invalid("the path has a '..' component"),
            Component::Normal(name) => resolved.push(name),
        }
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn relative_paths_start_at_home() {
        for (given, expected) in [
            ("a", "/home/sandbox/a"),
            ("./a//b/.", "/home/sandbox/a/b"),
            (".", HOME),
            ("/", "/"),
            ("//x/", "/x"),
        ] {
            assert_eq!(resolve(given).unwrap(), Path::new(expected), "{given}");
        }
    }

    #[test]
    fn what_is_no_path_is_refused() {
        let long = "a".repeat(MAX_PATH + 1);
        for given in ["", "..", "/a/../b", "a/..", "a\0b", long.as_str()] {
            assert_eq!(resolve(given).unwrap_err().code(), tonic::Code::InvalidArgument, "{given:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_given_stays_absolute_and_without_dots(given in ".{0,64}") {
            if let Ok(path) = resolve(&given) {
                prop_assert!(path.is_absolute());
                prop_assert!(path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_))));
            }
        }
    }
}

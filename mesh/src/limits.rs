//! What the system lets a process have.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Lets this process open as many files as it may at most: the usual default of 1024 is for programs that use
/// `select(2)`, and each microVM and each connection takes some.
///
/// # Errors
///
/// If the system refuses; then the process goes on with what it has.
pub fn raise_open_files() -> std::io::Result<u64> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_allowed_is_taken() {
        let most = raise_open_files().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (most, most));
    }
}

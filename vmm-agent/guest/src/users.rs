//! Users of the guest, from `/etc/passwd` and `/etc/group` as they are now. A static binary cannot ask NSS, and the
//! guest has nothing else to ask.

use std::{fs, io};

/// Who commands run as, and who owns new files, unless told otherwise.
pub const DEFAULT: &str = "sandbox";

/// A user as a process needs it (passwd(5), group(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User ID.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one too.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Looks `name` up. `None` if there is no such user.
///
/// # Errors
///
/// If the files cannot be read.
pub fn find(name: &str) -> io::Result<Option<User>> {
    Ok(parse(name, &fs::read_to_string("/etc/passwd")?, &fs::read_to_string("/etc/group")?))
}

fn parse(name: &str, passwd: &str, group: &str) -> Option<User> {
    let fields =
        passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == name)?;
    let [_, _, uid, gid, _, home, shell] = fields.as_slice() else { return None };
    let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
    let mut groups = vec![gid];
    for fields in group.lines().map(|line| line.split(':').collect::<Vec<_>>()) {
        let [_, _, id, members] = fields.as_slice() else { continue };
        if let Ok(id) = id.parse()
            && members.split(',').any(|member| member == name)
            && !groups.contains(&id)
        {
            groups.push(id);
        }
    }
    Some(User { name: name.into(), uid, gid, groups, home: (*home).into(), shell: (*shell).into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken:x\nann:x:1000:1000:,,,:/home/ann:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:bob,ann\nann:x:1000:\nbroken\nann2:x:9:anna\n";

    #[test]
    fn a_user_has_the_groups_that_name_it() {
        let ann = parse("ann", PASSWD, GROUP).unwrap();
        assert_eq!((ann.uid, ann.gid, ann.groups.as_slice()), (1000, 1000, [1000, 27].as_slice()));
        assert_eq!((ann.home.as_str(), ann.shell.as_str()), ("/home/ann", "/bin/sh"));
    }

    #[test]
    fn nobody_else_is_a_user() {
        for name in ["", "an", "broken", "ann:x"] {
            assert_eq!(parse(name, PASSWD, GROUP), None, "{name}");
        }
    }
}

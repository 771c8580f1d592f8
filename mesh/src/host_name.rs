//! Host names: which may be one, and which is below another.

/// Longest one, without a dot at its end (RFC 1035, 2.3.4).
const MAX: usize = 253;
/// Longest label of one.
const MAX_LABEL: usize = 63;
/// All names below it lead to whoever asks (RFC 6761, 6.3).
pub const LOCALHOST: &str = "localhost";

/// As names are compared: in lower case, without a dot at the end.
pub fn compared(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// Whether it is a host name as they are compared.
pub fn is_host_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (1..=MAX_LABEL).contains(&label.len())
            && label.bytes().all(legal)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= MAX && name.split('.').all(is_label)
}

/// Whether a name is `own`, or has whole labels before it, both as they are compared.
pub fn is_at_or_below(name: &str, own: &str) -> bool {
    name.strip_suffix(own).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Reads one of the mesh's own names from an option.
///
/// # Errors
///
/// What is wanted instead.
pub fn option(text: &str) -> Result<String, String> {
    let name = compared(text.trim());
    let wanted = "want a host name such as api.example.com, without a wildcard";
    if is_host_name(&name) { Ok(name) } else { Err(wanted.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_is_labels_of_letters_digits_and_hyphens() {
        for name in ["a", "app.example", "a-b.c1.example", "xn--bcher-kva.example", &"a".repeat(63)] {
            assert!(is_host_name(name), "{name}");
        }
        for name in ["", "App", "a.", ".a", "a..b", "-a", "a-", "a_b", "a b", "*.a", &"a".repeat(64)] {
            assert!(!is_host_name(name), "{name}");
        }
        assert!(!is_host_name(&["a"; 128].join(".")), "255 bytes");
    }

    #[test]
    fn names_are_below_others_by_whole_labels() {
        assert!(is_at_or_below("a.example", "a.example") && is_at_or_below("b.a.example", "a.example"));
        for other in ["xa.example", "example", "a.example.org", ""] {
            assert!(!is_at_or_below(other, "a.example"), "{other}");
        }
        assert!(!is_at_or_below("a.example", ""));
    }

    #[test]
    fn options_are_read_in_any_case() {
        assert_eq!(option(" API.example. ").as_deref(), Ok("api.example"));
        for wrong in ["*.example", "https://api.example", "api.example:443", "a..example", ""] {
            assert!(option(wrong).is_err(), "{wrong}");
        }
    }
}

//! Words for a POSIX shell.

/// `word` in single quotes, such that any POSIX shell reads back exactly `word`.
pub fn quote(word: &str) -> String {
    // Within single quotes only the single quote itself means anything.
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The line that exports a variable.
pub fn export(name: &str, value: &str) -> String {
    format!("export {name}={}", quote(value))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_shell_reads_back_what_was_quoted(word in "[^\0]{0,40}") {
            let script = format!("printf %s {}", quote(&word));
            let output = Command::new("sh").args(["-c", &script]).output().unwrap();
            prop_assert_eq!(output.stdout, word.as_bytes());
        }
    }

    #[test]
    fn an_export_survives_eval() {
        let script = format!("{}\nprintf %s \"$NAME\"", export("NAME", "a 'b' $(c) `d`\n"));
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(output.stdout, b"a 'b' $(c) `d`\n");
    }
}

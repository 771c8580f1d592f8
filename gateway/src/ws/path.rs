//! Which paths lead to a stream: `/sandboxes/{id}/exec/{sid}`, `…/agent/{sid}` and `…/pty/{sid}`, each with and without
//! `/api` in front.

use percent_encoding::percent_decode_str;

/// What a stream's messages are to a client that speaks the published framing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Frames that begin with a byte that says what they are.
    Exec,
    /// The bytes of a terminal.
    Terminal,
}

/// A session that is to be attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// How it is spoken to.
    pub kind: Kind,
    /// Its sandbox.
    pub sandbox_id: String,
    /// Its ID.
    pub session_id: String,
    /// Names the route in logs and metrics.
    pub route: &'static str,
}

/// A part of the path is not UTF-8 once its escapes are resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an ID in the path is not UTF-8")]
pub struct NotUtf8;

/// The session that a path names; `None` if no stream is there. `path` is still percent-encoded: an encoded `/` does not
/// separate, as with REST.
///
/// # Errors
/// An ID is not UTF-8.
pub fn find(path: &str) -> Option<Result<Named, NotUtf8>> {
    let (under_api, rest) = match path.strip_prefix("/api/") {
        Some(rest) => (true, rest),
        None => (false, path.strip_prefix('/')?),
    };
    let mut segments = rest.split('/');
    let (sandboxes, sandbox_id) = (segments.next()?, segments.next()?);
    let (stream, session_id) = (segments.next()?, segments.next()?);
    if sandboxes != "sandboxes" || sandbox_id.is_empty() || session_id.is_empty() || segments.next().is_some()
    {
        return None;
    }
    let (kind, route) = match (stream, under_api) {
        ("exec", true) => (Kind::Exec, "/api/sandboxes/{sandbox_id}/exec/{session_id}"),
        ("exec", false) => (Kind::Exec, "/sandboxes/{sandbox_id}/exec/{session_id}"),
        ("agent", true) => (Kind::Exec, "/api/sandboxes/{sandbox_id}/agent/{session_id}"),
        ("agent", false) => (Kind::Exec, "/sandboxes/{sandbox_id}/agent/{session_id}"),
        ("pty", true) => (Kind::Terminal, "/api/sandboxes/{sandbox_id}/pty/{session_id}"),
        ("pty", false) => (Kind::Terminal, "/sandboxes/{sandbox_id}/pty/{session_id}"),
        _ => return None,
    };
    Some(match (decoded(sandbox_id), decoded(session_id)) {
        (Some(sandbox_id), Some(session_id)) => Ok(Named { kind, sandbox_id, session_id, route }),
        _ => Err(NotUtf8),
    })
}

fn decoded(segment: &str) -> Option<String> {
    percent_decode_str(segment).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str) -> Option<(Kind, String, String)> {
        let named = find(path)?.unwrap();
        Some((named.kind, named.sandbox_id, named.session_id))
    }

    #[test]
    fn streams_are_at_three_paths_under_two_prefixes() {
        for prefix in ["", "/api"] {
            for (stream, kind) in [("exec", Kind::Exec), ("agent", Kind::Exec), ("pty", Kind::Terminal)] {
                let path = format!("{prefix}/sandboxes/sb-1/{stream}/e%2F1");
                assert_eq!(found(&path), Some((kind, "sb-1".to_owned(), "e/1".to_owned())), "{path}");
                let route = find(&path).unwrap().unwrap().route;
                assert_eq!(route, format!("{prefix}/sandboxes/{{sandbox_id}}/{stream}/{{session_id}}"));
            }
        }
    }

    #[test]
    fn nothing_is_a_stream_elsewhere() {
        for path in [
            "",
            "/",
            "/sandboxes/sb-1/exec",
            "/sandboxes/sb-1/exec/",
            "/sandboxes//exec/e",
            "/sandboxes/sb-1/exec/e/result",
            "/sandboxes/sb-1/files/e",
            "/api/api/sandboxes/sb-1/exec/e",
            "//sandboxes/sb-1/exec/e",
            "/apisandboxes/sb-1/exec/e",
        ] {
            assert_eq!(find(path), None, "{path}");
        }
        assert_eq!(find("/sandboxes/sb-1/exec/%ff"), Some(Err(NotUtf8)));
    }
}

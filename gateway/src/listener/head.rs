//! A request's head as HTTP/1.1 has it, read before hyper reads it.
//!
//! hyper answers what it cannot read by itself, with a bare status, and takes a request that says in two ways how long its body
//! is for one that says it in one: nothing behind hyper can see or log either. So whatever hyper would refuse is refused here, with
//! the same parser and the same limits, and with it what two parsers could read in two ways (RFC 9112, 2.2, 3.2, 6.3 and 11.2).

use std::mem::MaybeUninit;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri,
    header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE},
};
use httparse::{EMPTY_HEADER, Header, Status};
use oc_mesh::error::Reason;

use super::chunks::Chunks;

/// Bytes of a head. hyper's buffer has this size, too.
pub const MAX_BYTES: usize = 256 << 10;
/// Its fields: hyper's own limit, too. With another one it takes memory from the heap for each head.
pub const MAX_FIELDS: usize = 100;
/// Bytes of its target; hyper's own limit.
const MAX_TARGET: usize = u16::MAX as usize - 1;
/// Longest name of a field; `http`'s own limit.
const MAX_NAME: usize = u16::MAX as usize;
/// Bytes of empty lines before it. Some old clients send one behind a body (RFC 9112, 2.2).
const MAX_LEAD: usize = 8;
/// Longest body: what can be counted up without overflowing.
const MAX_LENGTH: u64 = i64::MAX as u64;

/// Why what came is no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It is not of this form.
    #[error("this is no request of HTTP/1.1: {0}")]
    Form(httparse::Error),
    /// One of its lines has an end that not everybody takes for one.
    #[error("a line of a request's head ends with CR LF, not with LF alone")]
    LineEnd,
    /// It does not say, or says twice, which host it is for.
    #[error("a request has one Host, which it may lack in HTTP/1.0 alone")]
    Host,
    /// Its target is no URI.
    #[error("the request's target is no URI")]
    Target,
    /// Its target is too long.
    #[error("the request's target is longer than {MAX_TARGET} bytes")]
    TargetTooLong,
    /// It is too large.
    #[error("the request's head has more than {MAX_FIELDS} fields, or more than {MAX_BYTES} bytes")]
    TooLarge,
    /// It says twice how long its body is.
    #[error("a request has a Content-Length or a Transfer-Encoding, not both")]
    TwoFramings,
    /// It does not say how long its body is.
    #[error("a request's Content-Length is one number")]
    Length,
    /// Its body is encoded in a way that is not read.
    #[error("a request's Transfer-Encoding is `chunked`, once, and not in HTTP/1.0")]
    Encoding,
    /// It came as it is to a port that speaks TLS.
    #[error("this port speaks TLS: use https://")]
    WithoutTls,
    /// It did not come.
    #[error("the rest of the request's head did not come in time")]
    Late,
    /// It will not come.
    #[error("the connection ended amid the request's head")]
    Cut,
}

impl Problem {
    /// The stable reason of it.
    #[must_use]
    pub fn reason(self) -> Reason {
        match self {
            Self::TargetTooLong => Reason::TargetTooLong,
            Self::TooLarge => Reason::HeadTooLarge,
            Self::Late => Reason::RequestTimeout,
            _ => Reason::InvalidArgument,
        }
    }
}

/// What is no request.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub problem: Problem,
    /// As much of it as could be read.
    pub request: Request<()>,
}

impl Refused {
    /// One that begins with these bytes. Of a head that is not whole, or of none, it has the fields before what is wrong.
    #[must_use]
    pub fn beginning(problem: Problem, bytes: &[u8]) -> Box<Self> {
        let mut storage = [EMPTY_HEADER; MAX_FIELDS];
        let mut head = httparse::Request::new(&mut storage);
        let _ = head.parse(bytes);
        let mut refused = Self::unread(problem);
        let request = &mut refused.request;
        if let Some(method) = head.method.and_then(|method| Method::from_bytes(method.as_bytes()).ok()) {
            *request.method_mut() = method;
        }
        if let Some(target) = head.path.and_then(|target| Uri::try_from(target).ok()) {
            *request.uri_mut() = target;
        }
        *request.headers_mut() = fields(head.headers);
        Box::new(refused)
    }

    /// One of which nothing could be read, with a method that is none.
    fn unread(problem: Problem) -> Self {
        let mut request = Request::new(());
        if let Ok(method) = Method::from_bytes(b"-") {
            *request.method_mut() = method;
        }
        Self { problem, request }
    }
}

fn fields(headers: &[Header<'_>]) -> HeaderMap {
    let fields = headers.iter().filter_map(|field| {
        Some((HeaderName::try_from(field.name).ok()?, HeaderValue::from_bytes(field.value).ok()?))
    });
    let mut map = HeaderMap::new();
    for (name, value) in fields {
        map.append(name, value);
    }
    map
}

/// What is behind a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// So many bytes, maybe none.
    Length(u64),
    /// Chunks.
    Chunked(Chunks),
}

/// A head that is in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Bytes of it.
    pub length: usize,
    /// What is behind it.
    pub body: Body,
    /// Whether what is behind that may be no HTTP any more, if the answer says so.
    pub may_switch: bool,
}

/// Reads a head; `None` if it is not all there.
///
/// # Errors
/// [`Refused`].
pub fn read(bytes: &[u8]) -> Result<Option<Head>, Box<Refused>> {
    if bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count() > MAX_LEAD {
        return Err(Box::new(Refused::unread(Problem::Form(httparse::Error::NewLine))));
    }
    let mut storage = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut head = httparse::Request::new(&mut []);
    let parsed = head.parse_with_uninit_headers(bytes, &mut storage);
    let so_far = match parsed {
        Ok(Status::Complete(length)) => &bytes[..length],
        _ => bytes,
    };
    let judged = match parsed {
        Ok(_) if has_bare_line_feed(so_far) => Err(Problem::LineEnd),
        Ok(Status::Complete(length)) if length <= MAX_BYTES => judge(&head).map(|behind| (length, behind)),
        Ok(Status::Partial) if bytes.len() < MAX_BYTES => return Ok(None),
        Ok(_) | Err(httparse::Error::TooManyHeaders) => Err(Problem::TooLarge),
        Err(error) => Err(Problem::Form(error)),
    };
    match judged {
        Ok((length, (body, may_switch))) => Ok(Some(Head { length, body, may_switch })),
        Err(problem) => Err(Refused::beginning(problem, bytes)),
    }
}

/// What is behind a head whose form is right, and whether it may switch to another protocol.
fn judge(head: &httparse::Request<'_, '_>) -> Result<(Body, bool), Problem> {
    let is_http11 = head.version == Some(1);
    let target = head.path.unwrap_or_default();
    if target.len() > MAX_TARGET {
        return Err(Problem::TargetTooLong);
    }
    Uri::try_from(target).map_err(|_| Problem::Target)?;
    let (mut length, mut is_chunked, mut hosts) = (None, false, 0);
    let mut may_switch = head.method == Some("CONNECT");
    for field in &*head.headers {
        if field.name.len() > MAX_NAME {
            return Err(Problem::TooLarge);
        }
        let is = |name: HeaderName| field.name.eq_ignore_ascii_case(name.as_str());
        if is(TRANSFER_ENCODING) {
            if is_chunked || !is_http11 || !field.value.eq_ignore_ascii_case(b"chunked") {
                return Err(Problem::Encoding);
            }
            is_chunked = true;
        } else if is(CONTENT_LENGTH) {
            let told = number(field.value).ok_or(Problem::Length)?;
            if length.is_some_and(|length| length != told) {
                return Err(Problem::Length);
            }
            length = Some(told);
        } else if is(UPGRADE) {
            may_switch |= is_http11;
        } else if is(HOST) {
            hosts += 1;
        }
    }
    if hosts > 1 || hosts == 0 && is_http11 {
        return Err(Problem::Host);
    }
    match (is_chunked, length) {
        (true, Some(_)) => Err(Problem::TwoFramings),
        (true, None) => Ok((Body::Chunked(Chunks::default()), may_switch)),
        (false, length) => Ok((Body::Length(length.unwrap_or(0)), may_switch)),
    }
}

/// Digits alone.
fn number(value: &[u8]) -> Option<u64> {
    let is_number = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(value).ok().filter(|_| is_number)?;
    text.parse().ok().filter(|length| *length <= MAX_LENGTH)
}

/// Whether a line ends with LF alone. Looked through to the end, which can be done many bytes at a time.
fn has_bare_line_feed(head: &[u8]) -> bool {
    let behind = head.get(1..).unwrap_or_default();
    let begins_with_one = head.first() == Some(&b'\n');
    behind
        .iter()
        .zip(head)
        .fold(begins_with_one, |found, (byte, before)| found | (*byte == b'\n') & (*before != b'\r'))
}

/// Whether a line without anything, which ends a head, is among the bytes from `from` on.
#[must_use]
pub fn may_end(bytes: &[u8], from: usize) -> bool {
    // The line may have begun before.
    let bytes = bytes.get(from.saturating_sub(3)..).unwrap_or_default();
    bytes
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'\n')
        .any(|(at, _)| matches!(&bytes[at + 1..], [b'\n', ..] | [b'\r', b'\n', ..]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn problem(head: &str) -> Problem {
        read(head.as_bytes()).unwrap_err().problem
    }

    #[test]
    fn a_head_says_what_is_behind_it() {
        let chunked = Body::Chunked(Chunks::default());
        for (head, body, may_switch) in [
            ("GET / HTTP/1.1\r\nhost:\r\n\r\n", Body::Length(0), false),
            ("\r\nGET / HTTP/1.0\r\nHost: x\r\n\r\n", Body::Length(0), false),
            ("GET / HTTP/1.0\r\n\r\n", Body::Length(0), false),
            ("PUT /x HTTP/1.1\r\nHost: x\r\ncontent-LENGTH:  12 \r\n\r\n", Body::Length(12), false),
            (
                "PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\nContent-Length: 012\r\n\r\n",
                Body::Length(12),
                false,
            ),
            ("PUT /x HTTP/1.1\r\nTransfer-Encoding: CHUNKED\r\nHost: x\r\n\r\n", chunked, false),
            ("GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n", Body::Length(0), true),
            ("GET / HTTP/1.0\r\nUpgrade: websocket\r\n\r\n", Body::Length(0), false),
            ("CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n", Body::Length(0), true),
        ] {
            // What comes behind it has ends of lines of its own.
            for rest in ["", "\r\n\r\n", "\nx\n\n"] {
                let read = read(format!("{head}{rest}").as_bytes()).unwrap();
                assert_eq!(read, Some(Head { length: head.len(), body, may_switch }), "{head:?}");
            }
            for length in 0..head.len() {
                assert_eq!(read(&head.as_bytes()[..length]).unwrap(), None, "{head:?} {length}");
            }
        }
    }

    #[test]
    fn what_says_in_two_ways_how_long_its_body_is_is_refused() {
        let with = |fields: &str| problem(&format!("POST /x HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\n"));
        let (length, chunked) = ("Content-Length: 5", "Transfer-Encoding: chunked");
        assert_eq!(with(&format!("{length}\r\n{chunked}")), Problem::TwoFramings);
        assert_eq!(with(&format!("{chunked}\r\nX: y\r\n{length}")), Problem::TwoFramings);
        assert_eq!(with(&format!("{chunked}\r\nContent-Length: 0")), Problem::TwoFramings);
        for lengths in
            ["5, 5", "-1", "+1", "", "0x5", "1 1", "9223372036854775808", "99999999999999999999999"]
        {
            assert_eq!(with(&format!("Content-Length: {lengths}")), Problem::Length, "{lengths}");
        }
        assert_eq!(with("Content-Length: 5\r\ncontent-length: 6"), Problem::Length);
        for encoding in
            ["gzip", "identity", "chunked, chunked", "gzip, chunked", "xchunked", "", "chunked;q=1"]
        {
            assert_eq!(with(&format!("Transfer-Encoding: {encoding}")), Problem::Encoding, "{encoding}");
        }
        assert_eq!(with(&format!("{chunked}\r\n{chunked}")), Problem::Encoding);
        assert_eq!(problem(&format!("POST / HTTP/1.0\r\n{chunked}\r\n\r\n")), Problem::Encoding);
        for wrong in ["Content-Length: x\r\n", "X : y\r\n", &"x: y\r\n".repeat(MAX_FIELDS)] {
            let head = format!("POST /x HTTP/1.1\r\nHost: a\r\n{wrong}\r\n");
            let refused = read(head.as_bytes()).unwrap_err().request;
            assert_eq!((refused.method(), refused.uri().path()), (&Method::POST, "/x"), "{wrong}");
            assert_eq!(refused.headers()["host"], "a", "{wrong}");
        }
    }

    #[test]
    fn a_head_names_one_host() {
        for version in ["HTTP/1.0", "HTTP/1.1"] {
            let problem = |fields: &str| problem(&format!("GET http://x/ {version}\r\n{fields}\r\n"));
            assert_eq!(problem("Host: x\r\nhost: x\r\n"), Problem::Host);
            assert_eq!(problem("Host: x\r\nA: b\r\nHost: y\r\n"), Problem::Host);
        }
        assert_eq!(problem("GET http://x/ HTTP/1.1\r\nX-Host: x\r\n\r\n"), Problem::Host);
        assert_eq!(problem("GET / HTTP/1.1\r\n\r\n"), Problem::Host);
    }

    #[test]
    fn a_line_that_ends_with_lf_alone_is_refused_as_soon_as_it_is_there() {
        let good = "\r\nGET / HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n";
        for (at, _) in good.match_indices("\r\n") {
            let mut head = good.to_owned();
            head.remove(at);
            assert_eq!(problem(&head), Problem::LineEnd, "{head:?}");
            assert_eq!(problem(&head[..=at]), Problem::LineEnd, "{head:?}");
        }
        assert_eq!(problem(&good.replace('\r', "")), Problem::LineEnd);
        assert_eq!(problem("\n"), Problem::LineEnd);
        let refused = read(b"GET /x HTTP/1.1\nHost: a\n\n").unwrap_err().request;
        assert!(refused.uri().path() == "/x" && refused.headers()["host"] == "a");
    }

    #[test]
    fn what_cannot_be_read_is_refused_at_once() {
        for (head, reason) in [
            ("\x16\x03\x01\x02".to_owned(), Reason::InvalidArgument),
            ("GET / HTTP/9.9\r\n".to_owned(), Reason::InvalidArgument),
            ("\r\n".repeat(5), Reason::InvalidArgument),
            ("GET / HTTP/1.1\r\nX : y\r\n\r\n".to_owned(), Reason::InvalidArgument),
            ("GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n".to_owned(), Reason::InvalidArgument),
            ("GET x y HTTP/1.1\r\n\r\n".to_owned(), Reason::InvalidArgument),
            ("GET http://[::1/x HTTP/1.1\r\n\r\n".to_owned(), Reason::InvalidArgument),
            (format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(70_000)), Reason::TargetTooLong),
            (format!("GET / HTTP/1.1\r\nX: {}", "y".repeat(MAX_BYTES)), Reason::HeadTooLarge),
            (format!("GET / HTTP/1.1\r\n{}: y\r\n\r\n", "x".repeat(70_000)), Reason::HeadTooLarge),
            (format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(MAX_FIELDS + 1)), Reason::HeadTooLarge),
        ] {
            assert_eq!(problem(&head).reason(), reason, "{:.80}", head);
        }
        let most = format!("GET / HTTP/1.0\r\n{}\r\n", "x: y\r\n".repeat(MAX_FIELDS));
        assert!(read(most.as_bytes()).unwrap().is_some());
    }

    proptest! {
        #[test]
        fn a_head_ends_where_it_may_end(lines in "(a:x\r\n|\r\n|[ax:\r\n]){0,10}", from in 0_usize..40) {
            let head = format!("GET / HTTP/1.0\r\n{lines}");
            let ends = |from: usize| may_end(head.as_bytes(), from);
            if let Ok(Some(read)) = read(head.as_bytes()) {
                prop_assert!(ends(0) && ends(read.length - 1));
            }
            prop_assert!(ends(0) || !ends(from));
        }
    }
}

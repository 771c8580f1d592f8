//! A download says how long it is, so that clients can show progress and notice an end that came too early. The
//! length is in the first message, beside the bytes and not in a header: no annotation says so.
//!
//! A file may change while it is read, and kernel files (`/proc`, `/sys`) lie about their size: 0, or a page. So
//! 0 is not announced, and up to [`SMALL`] the bytes are read before they are announced. What grows beyond the
//! announced length is cut; what ends before it breaks the answer.

use bytes::Bytes;
use prost_reflect::DynamicMessage;

/// Sizes up to here may be a kernel file's lie: a page, on any platform.
pub const SMALL: u64 = 64 << 10;

/// Bytes that will follow, by the answer's first message and the request's `offset` and `limit`; `None` if it
/// cannot be said.
#[must_use]
pub fn announced(request: &DynamicMessage, first: &DynamicMessage) -> Option<u64> {
    let info = first.get_field_by_name("info")?;
    let size = positive(info.as_message()?, "size")?;
    let rest = size.saturating_sub(positive(request, "offset").unwrap_or(0));
    let length = match positive(request, "limit") {
        Some(limit) => rest.min(limit),
        None => rest,
    };
    (length > 0).then_some(length)
}

fn positive(message: &DynamicMessage, field: &str) -> Option<u64> {
    let value = message.get_field_by_name(field)?.as_i64()?;
    u64::try_from(value).ok().filter(|value| *value > 0)
}

/// Bytes that may still be sent of those announced.
#[derive(Debug)]
pub struct Remaining(Option<u64>);

impl Remaining {
    /// Counts down from what was announced.
    #[must_use]
    pub fn new(announced: Option<u64>) -> Self {
        Self(announced)
    }

    /// The part of `piece` that may be sent.
    pub fn take(&mut self, mut piece: Bytes) -> Bytes {
        if let Some(left) = &mut self.0 {
            piece.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= piece.len() as u64;
        }
        piece
    }

    /// Whether all that was announced has been sent.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.0 == Some(0)
    }

    /// Whether the bytes may end here.
    #[must_use]
    pub fn may_end(&self) -> bool {
        matches!(self.0, None | Some(0))
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::surface::Surface;

    fn length(size: i64, offset: i64, limit: i64) -> Option<u64> {
        let surface = Surface::load().unwrap();
        let dynamic = |name: &str, bytes: Vec<u8>| {
            DynamicMessage::decode(surface.pool().get_message_by_name(name).unwrap(), bytes.as_slice())
                .unwrap()
        };
        let request = oc_proto::v1::ReadFileRequest { offset, limit, ..Default::default() };
        let info = oc_proto::v1::FileInfo { size, ..Default::default() };
        let first = oc_proto::v1::ReadFileResponse { info: Some(info), body: None };
        announced(
            &dynamic("oc.v1.ReadFileRequest", request.encode_to_vec()),
            &dynamic("oc.v1.ReadFileResponse", first.encode_to_vec()),
        )
    }

    #[test]
    fn offset_and_limit_shorten_what_is_announced() {
        assert_eq!(length(100, 0, 0), Some(100));
        assert_eq!(length(100, 30, 0), Some(70));
        assert_eq!(length(100, 30, 50), Some(50));
        assert_eq!(length(100, 90, 50), Some(10));
        assert_eq!(length(100, 200, 0), None);
        assert_eq!(length(0, 0, 0), None);
        assert_eq!(length(-5, -5, -5), None);
    }

    #[test]
    fn no_more_than_announced_is_sent() {
        let mut remaining = Remaining::new(Some(5));
        assert_eq!(remaining.take(Bytes::from_static(b"abc")), "abc");
        assert!(!remaining.may_end());
        assert_eq!(remaining.take(Bytes::from_static(b"defg")), "de");
        assert!(remaining.is_complete() && remaining.may_end());
        assert!(Remaining::new(None).may_end());
    }
}

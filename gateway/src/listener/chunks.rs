//! Where a chunked body ends (RFC 9112, 7.1), read no further than that takes: lengths are counted, data is skipped.
//!
//! It takes exactly what hyper takes, which reads the same bytes after it: line ends are CR LF, nothing else.

/// How far a chunked body has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunks(At);

/// What the next byte belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// The first digit of a chunk's length.
    Start,
    /// Its other digits.
    Digits(u64),
    /// Space behind it.
    Space(u64),
    /// What is written behind its `;`.
    Extension(u64),
    /// The end of its line.
    LineEnd(u64),
    /// This much of its data, more than none.
    Data(u64),
    /// The end of its data's line.
    DataCr,
    DataLf,
    /// The first byte of a line behind the last chunk.
    Trailers,
    /// The rest of such a line.
    Trailer,
    TrailerLf,
    /// The end of the line that ends everything.
    LastLf,
    /// Behind it.
    End,
}

/// What no chunked body has in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl Default for Chunks {
    fn default() -> Self {
        Self(At::Start)
    }
}

impl Chunks {
    /// Whether the body has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.0 == At::End
    }

    /// How many of these bytes are the body's.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn follow(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        let mut taken = 0;
        while let (false, Some(&byte)) = (self.has_ended(), bytes.get(taken)) {
            if let At::Data(left) = self.0 {
                let there = bytes.len() - taken;
                let skipped = usize::try_from(left).map_or(there, |left| left.min(there));
                taken += skipped;
                self.0 = match left - skipped as u64 {
                    0 => At::DataCr,
                    left => At::Data(left),
                };
            } else {
                self.0 = self.0.after(byte).ok_or(Malformed)?;
                taken += 1;
            }
        }
        Ok(taken)
    }
}

impl At {
    /// Where this byte leads, if it may stand here.
    fn after(self, byte: u8) -> Option<Self> {
        let digit = char::from(byte).to_digit(16).map(u64::from);
        Some(match (self, byte) {
            (Self::Start, _) => Self::Digits(digit?),
            (Self::Digits(length) | Self::Space(length) | Self::Extension(length), b'\r') => {
                Self::LineEnd(length)
            }
            (Self::Digits(length) | Self::Space(length), b' ' | b'\t') => Self::Space(length),
            (Self::Digits(length) | Self::Space(length), b';') => Self::Extension(length),
            (Self::Digits(length), _) => Self::Digits(length.checked_mul(16)?.checked_add(digit?)?),
            (Self::Extension(length), byte) if byte != b'\n' => Self::Extension(length),
            (Self::LineEnd(0), b'\n') => Self::Trailers,
            (Self::LineEnd(length), b'\n') => Self::Data(length),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Start,
            (Self::Trailers, b'\r') => Self::LastLf,
            (Self::Trailer, b'\r') => Self::TrailerLf,
            (Self::Trailers | Self::Trailer, _) => Self::Trailer,
            (Self::TrailerLf, b'\n') => Self::Trailers,
            (Self::LastLf, b'\n') => Self::End,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// How many bytes of a body that comes in pieces of this size are its own, and whether it has ended.
    fn followed(body: &[u8], size: usize) -> Result<(usize, bool), Malformed> {
        let (mut chunks, mut taken) = (Chunks::default(), 0);
        for piece in body.chunks(size) {
            taken += chunks.follow(piece)?;
        }
        Ok((taken, chunks.has_ended()))
    }

    #[test]
    fn a_body_ends_where_the_rfc_says() {
        for (body, rest) in [
            ("0\r\n\r\n", ""),
            ("0\r\n\r\n", "GET / HTTP/1.1\r\n"),
            ("5\r\nhello\r\n0\r\n\r\n", "\r\n"),
            ("A;x=\"y\r\n0123456789\r\n000 ;z\r\n\r\n", "0\r\n\r\n"),
            ("2 \t\r\n\r\n\r\n0\r\nx-sum: 1\r\nodd: 2\r\n\r\n", "x"),
        ] {
            let whole = format!("{body}{rest}");
            for size in 1..=whole.len() {
                assert_eq!(followed(whole.as_bytes(), size), Ok((body.len(), true)), "{whole:?} {size}");
            }
        }
        assert_eq!(followed(b"5\r\nhel", 3), Ok((6, false)));
    }

    #[test]
    fn what_is_no_chunk_is_not_followed() {
        for body in [
            "x\r\n",
            "\r\n",
            "-1\r\n",
            "5\n",
            "5\rx",
            "5 5\r\n",
            "5;\n",
            "5\r\nhello0",
            "5\r\nhello\n",
            "0\r\nx: y\rz",
            "0\r\n\rx",
            "10000000000000000\r\n",
        ] {
            assert_eq!(followed(body.as_bytes(), 2), Err(Malformed), "{body:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_alike_however_it_is_cut(
            body in "[0-9a;\r\n x]{0,40}",
            size in 1_usize..8,
        ) {
            prop_assert_eq!(followed(body.as_bytes(), size), followed(body.as_bytes(), 64));
        }
    }
}

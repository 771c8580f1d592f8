//! Where a service listens or is reached: `unix:///path`, or `http://host:port` (`tcp://` means the same).

use std::{fmt, path::PathBuf, str::FromStr};

use thiserror::Error;

/// An address of one of our own services.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String),
}

/// The text names no endpoint.
#[derive(Debug, Error)]
#[error("{0:?} is no endpoint: want unix:///path or http://host:port")]
pub struct EndpointError(String);

impl EndpointError {
    pub(crate) fn new(text: &str) -> Self {
        Self(text.into())
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        match text.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("http" | "tcp", authority)) if is_authority(authority.trim_end_matches('/')) => {
                Ok(Self::Tcp(authority.trim_end_matches('/').into()))
            }
            _ => Err(EndpointError(text.into())),
        }
    }
}

fn is_authority(text: &str) -> bool {
    text.parse::<http::uri::Authority>().is_ok_and(|authority| authority.port_u16().is_some())
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(authority) => write!(f, "http://{authority}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_survive_printing() {
        for text in ["unix:///run/oc/agent.sock", "http://127.0.0.1:7000", "http://[::1]:7000"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "unix://relative", "http://host", "https://host:1", "127.0.0.1:80", "http://a b:1"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}

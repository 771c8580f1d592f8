//! A request for a WebSocket, as the port gets it, and the port's consent, as the client gets that. Between gateway and port both
//! are HTTP/1.1 (RFC 6455); a client of HTTP/2 asks without a challenge, so the gateway poses its own (RFC 8441, 5).

use http::{
    HeaderMap, HeaderValue, Method, Response, StatusCode,
    header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE},
    request::Parts,
};
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};
use tonic::body::Body;

use super::headers::remove_hop_by_hop;
use crate::ws::handshake::Asks;

/// What a port was asked.
#[derive(Debug)]
pub enum Opening {
    /// What the client itself had asked, that checks the answer.
    Upgrade,
    /// A challenge of ours.
    Connect {
        /// What the port answers it with.
        accept: String,
    },
}

impl Opening {
    /// Has a request, without what is for the next hop alone, ask a port for a WebSocket.
    pub fn ask(asks: Asks, request: &mut Parts) -> Self {
        ask_for_websocket(&mut request.headers);
        match asks {
            Asks::Upgrade => Self::Upgrade,
            Asks::Connect => {
                let key = generate_key();
                let accept = derive_accept_key(key.as_bytes());
                request.method = Method::GET;
                // Base64 is always a value.
                if let Ok(key) = HeaderValue::try_from(key) {
                    request.headers.insert(SEC_WEBSOCKET_KEY, key);
                }
                Self::Connect { accept }
            }
        }
    }

    /// The answer to a client whose port has answered 101 with these headers.
    ///
    /// # Errors
    /// The port answered another challenge.
    pub fn opened(self, answer: &HeaderMap) -> Result<Response<Body>, &'static str> {
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        headers.clone_from(answer);
        remove_hop_by_hop(headers);
        match self {
            Self::Upgrade => {
                ask_for_websocket(headers);
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            }
            Self::Connect { accept } => {
                if headers.remove(SEC_WEBSOCKET_ACCEPT).is_none_or(|given| given != accept.as_str()) {
                    return Err("opened another WebSocket than it was asked for");
                }
            }
        }
        Ok(response)
    }
}

/// Has a request ask to become a WebSocket, or an answer say that it has.
fn ask_for_websocket(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn asked(asks: Asks) -> (Opening, Parts) {
        let request = Request::builder().method(Method::CONNECT).header("cookie", "a=b").body(());
        let mut parts = request.unwrap().into_parts().0;
        (Opening::ask(asks, &mut parts), parts)
    }

    #[test]
    fn a_client_of_http2_gets_no_challenge_and_the_port_gets_ours() {
        let (opening, parts) = asked(Asks::Connect);
        assert_eq!(
            (parts.method, &parts.headers[UPGRADE]),
            (Method::GET, &HeaderValue::from_static("websocket"))
        );
        assert_eq!(parts.headers["cookie"], "a=b");
        let mut answer = HeaderMap::new();
        ask_for_websocket(&mut answer);
        let accept = derive_accept_key(parts.headers[SEC_WEBSOCKET_KEY].as_bytes());
        answer.insert(SEC_WEBSOCKET_ACCEPT, accept.parse().unwrap());
        answer.insert("sec-websocket-protocol", "chat".parse().unwrap());
        let response = opening.opened(&answer).unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let left: Vec<_> = response.headers().keys().collect();
        assert_eq!(left, ["sec-websocket-protocol"]);
        // Another's.
        assert!(asked(Asks::Connect).0.opened(&answer).is_err());
        answer.remove(SEC_WEBSOCKET_ACCEPT);
        assert!(asked(Asks::Connect).0.opened(&answer).is_err());
        // A client of HTTP/1.1 has posed its own, and checks the answer itself.
        let response = asked(Asks::Upgrade).0.opened(&answer).unwrap();
        assert_eq!((response.status(), response.headers().len()), (StatusCode::SWITCHING_PROTOCOLS, 3));
    }
}

//! What is answered in place of a port: a page for who reads, JSON for who does not, as `Accept` says.

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Response,
    header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, WWW_AUTHENTICATE},
};
use http_body_util::Full;
use oc_mesh::error::Reason;
use tonic::{Status, body::Body};

use crate::{failure, rest::answer};

/// Seconds after which a page looks again, where that may help.
const LOOK_AGAIN: u32 = 3;

/// Whether who asks would rather read than parse.
#[must_use]
pub fn wants_html(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted
        .flat_map(|value| value.split(','))
        .any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/html")))
}

/// The answer to a request that failed.
#[must_use]
pub fn answer(error: &Status, html: bool, request_id: &str) -> Response<Body> {
    let reason = failure::reason(error);
    let mut response = answer::error(error);
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if reason == Reason::Unauthenticated.as_str() {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"preview\""));
    }
    if !html {
        return response;
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    let code = response.status().as_u16();
    let passes = reason == Reason::PortNotListening.as_str() || code == 503;
    let again =
        if passes { format!("<meta http-equiv=refresh content={LOOK_AGAIN}>") } else { String::new() };
    let hint = match passes {
        true => "<p>This page looks again every few seconds.</p>",
        false => "",
    };
    let text = escape(error.message());
    let page = format!(
        "<!doctype html><html lang=en><meta charset=utf-8>{again}<title>{code} {reason}</title>\
         <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:40em;margin:15vh auto;padding:0 1em}}\
         h1{{font-size:1.3em}}small{{color:#666}}</style>\
         <h1>{text}</h1>{hint}<p><small>{code} {reason} · request {request_id}</small></p></html>\n"
    );
    *response.body_mut() = Body::new(Full::new(Bytes::from(page)));
    response
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use oc_mesh::error::status;

    use super::*;

    #[tokio::test]
    async fn who_reads_gets_a_page_and_who_parses_json() {
        let accepts = |value: &'static str| {
            wants_html(&[(ACCEPT, HeaderValue::from_static(value))].into_iter().collect())
        };
        assert!(
            accepts("text/html,application/xhtml+xml,*/*;q=0.8")
                && !accepts("*/*")
                && !accepts("application/json")
        );
        let error = status(Reason::PortNotListening, "port 80: <nobody>");
        for (html, kind, part) in [
            (true, "text/html; charset=utf-8", "&lt;nobody&gt;"),
            (false, "application/json", "PORT_NOT_LISTENING"),
        ] {
            let response = answer(&error, html, "r-1");
            assert_eq!(
                (response.status().as_u16(), &response.headers()[CONTENT_TYPE]),
                (502, &HeaderValue::from_static(kind))
            );
            let body = response.into_body().collect().await.unwrap().to_bytes();
            let body = String::from_utf8(body.to_vec()).unwrap();
            assert!(body.contains(part) && !(html && body.contains("<nobody>")), "{body}");
        }
    }
}

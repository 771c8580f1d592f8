//! A call that its client gives up is not one whose messages have all come.
//!
//! tonic ends the stream of a cancelled call as if it were complete (`RST_STREAM` with `CANCEL`, decode.rs in 0.14):
//! half a file would be kept for the whole one.

use http_body_util::BodyExt as _;
use tonic::{Status, body::Body, codegen::http::Request};

/// Makes the request's messages end with an error where the call was broken off, whichever way.
pub fn broken_off_is_an_error(request: Request<Body>) -> Request<Body> {
    request.map(|body| Body::new(body.map_err(|error| Status::aborted(format!("broken off: {error}")))))
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use http_body::Frame;
    use http_body_util::StreamBody;
    use oc_proto::v1::{WriteFileRequest, file_service_server::FileServiceServer};
    use prost::Message as _;
    use tonic::codegen::Service as _;

    use super::*;
    use crate::files::Files;

    /// A call of `WriteFile` whose stream ends with `end`.
    async fn write(path: &std::path::Path, end: Option<Status>) -> Option<Status> {
        let head = WriteFileRequest {
            path: path.to_str().unwrap().to_owned(),
            body: Some(oc_proto::google::api::HttpBody { data: "half".into(), ..Default::default() }),
            ..Default::default()
        };
        let length = u32::try_from(head.encoded_len()).unwrap().to_be_bytes();
        let message = [&[0], &length[..], &head.encode_to_vec()].concat();
        let frames = std::iter::once(Ok(Frame::data(message.into()))).chain(end.map(Err));
        let request = Request::post("/oc.v1.FileService/WriteFile")
            .body(Body::new(StreamBody::new(stream::iter(frames))))
            .unwrap();
        let mut service = FileServiceServer::new(Files::default());
        let response = service.call(broken_off_is_an_error(request)).await.unwrap();
        Status::from_header_map(response.headers())
    }

    #[tokio::test]
    async fn a_cancelled_upload_is_not_kept() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("f");
        assert!(write(&file, None).await.is_none());
        assert_eq!(std::fs::read(&file).unwrap(), b"half");
        std::fs::write(&file, "before").unwrap();
        let refused = write(&file, Some(Status::cancelled("gone"))).await.unwrap();
        assert_eq!(refused.code(), tonic::Code::Aborted);
        assert_eq!(std::fs::read(&file).unwrap(), b"before");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

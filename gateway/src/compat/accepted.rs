//! `POST …/exec/run-async` answers 200 with the whole result of a command that ended at once, and 202 with the ID to ask
//! for it otherwise: the published TypeScript client tells the two apart by what the answer holds, others by its status.
//! An annotation has one status for all answers. The same with `POST …/preview`: 201 for a new one, 200 for one that was there.

use bytes::Bytes;
use http::StatusCode;
use oc_proto::v1::{CreatePreviewResponse, RunAsyncResponse};
use prost::Message as _;

use crate::surface::Rpc;

/// The status of a successful answer.
#[must_use]
pub fn status(rpc: &Rpc, answer: &Bytes) -> StatusCode {
    match rpc.method.full_name() {
        "oc.v1.ExecService.RunAsync" => match RunAsyncResponse::decode(answer.clone()) {
            Ok(answer) if answer.exec_id.is_some() => StatusCode::ACCEPTED,
            _ => rpc.success,
        },
        "oc.v1.PreviewService.CreatePreview" => match CreatePreviewResponse::decode(answer.clone()) {
            Ok(answer) if answer.existed => StatusCode::OK,
            _ => rpc.success,
        },
        _ => rpc.success,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::surface::Surface;

    #[test]
    fn only_a_command_that_runs_on_is_accepted() {
        let surface = Surface::load().unwrap();
        let encoded = |exec_id: Option<&str>| {
            RunAsyncResponse { exec_id: exec_id.map(str::to_owned), ..Default::default() }
                .encode_to_vec()
                .into()
        };
        let run_async = surface.find("/oc.v1.ExecService/RunAsync").unwrap();
        assert_eq!(status(run_async, &encoded(None)), StatusCode::OK);
        assert_eq!(status(run_async, &encoded(Some("e-1"))), StatusCode::ACCEPTED);
        let create = surface.find("/oc.v1.PreviewService/CreatePreview").unwrap();
        let preview = |existed| CreatePreviewResponse { preview: None, existed }.encode_to_vec().into();
        assert_eq!(status(create, &preview(true)), StatusCode::OK);
        assert_eq!(status(create, &preview(false)), StatusCode::CREATED);
        let start = surface.find("/oc.v1.ExecService/StartExec").unwrap();
        assert_eq!(status(start, &encoded(Some("e-1"))), StatusCode::CREATED);
    }
}

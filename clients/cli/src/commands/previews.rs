//! `oc preview`.

use jiff::Timestamp;
use oc_proto::v1::{
    CreatePreviewRequest, DeletePreviewRequest, ListPreviewsRequest, Preview, PreviewAuth,
    RotatePreviewAuthRequest,
};

use crate::{
    arguments::previews::{CreatePreviewArguments, PreviewCommand},
    commands::sandboxes::age,
    connection::{CALL_TIMEOUT, Connection, within},
    failure::Failure,
    json,
    output::{self, Output},
};

/// `oc preview …`.
pub async fn run(connection: &Connection, command: PreviewCommand, output: Output) -> Result<(), Failure> {
    let mut previews = connection.previews();
    match command {
        PreviewCommand::Create(arguments) => {
            let CreatePreviewArguments { sandbox, port, domain, auth } = arguments;
            let request = CreatePreviewRequest {
                sandbox_id: sandbox,
                port: port.into(),
                domain: domain.unwrap_or_default(),
                auth_config: auth.map(|token| PreviewAuth { scheme: "bearer".to_owned(), token }),
            };
            let answer = previews.create_preview(within(CALL_TIMEOUT, request)).await?.into_inner();
            let preview = answer.preview.unwrap_or_default();
            if !output.is_json() && !preview.preview_auth_token.is_empty() {
                output::note("token that requests must show; it is shown only now:");
                output::note(output::Printable(&preview.preview_auth_token));
            }
            output.show(|| json::of(&preview), || preview.url.clone())
        }
        PreviewCommand::List { sandbox } => {
            let request = ListPreviewsRequest { sandbox_id: sandbox };
            let listed = previews.list_previews(within(CALL_TIMEOUT, request)).await?.into_inner().previews;
            output.show(|| json::list(&listed), || table(&listed, Timestamp::now()))
        }
        PreviewCommand::Delete { sandbox, port } => {
            let request = DeletePreviewRequest { sandbox_id: sandbox, port: port.into() };
            previews.delete_preview(within(CALL_TIMEOUT, request)).await?;
            output.done()
        }
        PreviewCommand::RotateAuth { sandbox, remove } => {
            let request = RotatePreviewAuthRequest { sandbox_id: sandbox, remove };
            let rotated = previews.rotate_preview_auth(within(CALL_TIMEOUT, request)).await?.into_inner();
            if !output.is_json() && !rotated.preview_auth_token.is_empty() {
                output::note("token that requests must show; it is shown only now:");
            }
            output.show(|| json::of(&rotated), || rotated.preview_auth_token.clone())
        }
    }
}

fn table(previews: &[Preview], now: Timestamp) -> String {
    let rows = previews.iter().map(|preview| {
        let hostname = match preview.custom_hostname.as_str() {
            "" => &preview.hostname,
            own => own,
        };
        let auth = preview.auth_config.as_ref().map(|auth| auth.scheme.clone()).unwrap_or_default();
        [
            preview.port.to_string(),
            hostname.to_owned(),
            preview.ssl_status.clone(),
            if auth.is_empty() { "none".to_owned() } else { auth },
            preview.created_at.map(|created| age(created.seconds, now)).unwrap_or_default(),
        ]
    });
    output::table(["PORT", "HOSTNAME", "SSL", "AUTH", "AGE"], rows)
}

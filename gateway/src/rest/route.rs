//! Which RPC answers a method and a path.
//!
//! Built once, at start, from the `google.api.http` rule of every public RPC with its additional bindings.
//! A path that no rule has is `ROUTE_NOT_FOUND`; one that has a rule for other methods only is
//! `METHOD_NOT_ALLOWED`, and says which.

use std::{collections::BTreeMap, sync::Arc};

use http::Method;
use oc_proto::google::api::{HttpRule, http_rule::Pattern};
use percent_encoding::percent_decode_str;
use prost::Message as _;
use prost_reflect::{FieldDescriptor, Kind};

use crate::{
    rest::template::PathTemplate,
    surface::{Rpc, Surface, SurfaceError},
};

/// Full name of the message that stands for raw bytes.
const HTTP_BODY: &str = "google.api.HttpBody";

/// Where a part of the request comes from, or what of the answer is shown.
#[derive(Debug, Clone)]
pub enum Body {
    /// Nothing of it.
    None,
    /// The whole message, as JSON.
    Message,
    /// One field of it, as JSON.
    Field(FieldDescriptor),
    /// One field of it, a `google.api.HttpBody`: bytes as they are.
    Raw(FieldDescriptor),
}

/// One HTTP rule of one RPC.
#[derive(Debug)]
pub struct Route {
    /// The RPC.
    pub rpc: Arc<Rpc>,
    /// The path template as the contract has it: names the route in logs and metrics.
    pub template: String,
    /// What the HTTP body fills.
    pub request_body: Body,
    /// What the answer shows. Never [`Body::None`].
    pub response_body: Body,
    fields: Vec<Option<FieldDescriptor>>,
}

/// What a path leads to.
#[derive(Debug)]
pub enum Match {
    /// A route, and the fields that the path fills.
    Found(Arc<Route>, Vec<(FieldDescriptor, String)>),
    /// The path exists, for these methods only.
    WrongMethod(Vec<Method>),
    /// The path names no route.
    NotFound,
    /// A part of the path is not UTF-8 once its escapes are resolved.
    NotUtf8(FieldDescriptor),
}

/// A route, for whoever lists them.
#[derive(Debug, Clone)]
pub struct RouteInfo {
    /// The method.
    pub method: Method,
    /// The path template as the contract has it.
    pub template: String,
    /// The RPC.
    pub rpc: Arc<Rpc>,
}

/// All routes.
#[derive(Debug)]
pub struct Routes {
    paths: matchit::Router<Vec<(Method, Arc<Route>)>>,
    all: Vec<RouteInfo>,
}

impl Routes {
    /// Reads the HTTP rules of every public RPC.
    ///
    /// # Errors
    /// A rule that cannot be served, or two that claim the same method and path.
    pub fn new(surface: &Surface) -> Result<Self, SurfaceError> {
        let http = surface
            .pool()
            .get_extension_by_name("google.api.http")
            .ok_or(SurfaceError::MissingOption("google.api.http"))?;
        let mut paths: BTreeMap<String, Vec<(Method, Arc<Route>)>> = BTreeMap::new();
        for rpc in surface.rpcs() {
            let wrong =
                |problem: String| SurfaceError::Rule { rpc: rpc.method.full_name().to_owned(), problem };
            let options = rpc.method.options();
            let value = options.get_extension(&http);
            let Some(message) = value.as_message().filter(|_| options.has_extension(&http)) else { continue };
            let rule = HttpRule::decode(message.encode_to_vec().as_slice())
                .map_err(|error| wrong(error.to_string()))?;
            for binding in std::iter::once(&rule).chain(&rule.additional_bindings) {
                let (method, pattern, route) = Route::new(rpc, binding).map_err(wrong)?;
                let methods = paths.entry(pattern).or_default();
                if methods.iter().any(|(taken, _)| *taken == method) {
                    return Err(wrong(format!("{method} {} is taken", route.template)));
                }
                methods.push((method, Arc::new(route)));
            }
        }
        let mut router = matchit::Router::new();
        let mut all = Vec::new();
        for (pattern, methods) in paths {
            all.extend(methods.iter().map(|(method, route)| RouteInfo {
                method: method.clone(),
                template: route.template.clone(),
                rpc: Arc::clone(&route.rpc),
            }));
            router
                .insert(pattern.clone(), methods)
                .map_err(|error| SurfaceError::Rule { rpc: pattern, problem: error.to_string() })?;
        }
        Ok(Self { paths: router, all })
    }

    /// Every route.
    #[must_use]
    pub fn all(&self) -> &[RouteInfo] {
        &self.all
    }

    /// Finds the route. `path` is still percent-encoded: an encoded `/` does not separate.
    #[must_use]
    pub fn find(&self, method: &Method, path: &str) -> Match {
        let Ok(found) = self.paths.at(path) else { return Match::NotFound };
        let Some((_, route)) = found.value.iter().find(|(allowed, _)| allowed == method) else {
            return Match::WrongMethod(found.value.iter().map(|(method, _)| method.clone()).collect());
        };
        let mut bound = Vec::new();
        for (field, (_, text)) in route.fields.iter().zip(found.params.iter()) {
            let Some(field) = field else { continue };
            match percent_decode_str(text).decode_utf8() {
                Ok(text) => bound.push((field.clone(), text.into_owned())),
                Err(_) => return Match::NotUtf8(field.clone()),
            }
        }
        Match::Found(Arc::clone(route), bound)
    }
}

impl Route {
    fn new(rpc: &Arc<Rpc>, rule: &HttpRule) -> Result<(Method, String, Self), String> {
        let (method, path) = match &rule.pattern {
            Some(Pattern::Get(path)) => (Method::GET, path),
            Some(Pattern::Put(path)) => (Method::PUT, path),
            Some(Pattern::Post(path)) => (Method::POST, path),
            Some(Pattern::Delete(path)) => (Method::DELETE, path),
            Some(Pattern::Patch(path)) => (Method::PATCH, path),
            Some(Pattern::Custom(_)) | None => return Err("no method and path".to_owned()),
        };
        let template = PathTemplate::parse(path)?;
        let input = rpc.method.input();
        let fields = template
            .fields
            .iter()
            .map(|name| match name {
                None => Ok(None),
                Some(name) => match input.get_field_by_name(name) {
                    Some(field)
                        if field.is_list() || field.is_map() || matches!(field.kind(), Kind::Message(_)) =>
                    {
                        Err(format!("`{name}` cannot be read from a path"))
                    }
                    Some(field) => Ok(Some(field)),
                    None => Err(format!("the request has no field `{name}`")),
                },
            })
            .collect::<Result<_, _>>()?;
        let request_body = Body::new(&rule.body, &input, Body::None)?;
        let response_body = Body::new(&rule.response_body, &rpc.method.output(), Body::Message)?;
        let raw_in = matches!(request_body, Body::Raw(_));
        let raw_out = matches!(response_body, Body::Raw(_));
        if raw_in != rpc.method.is_client_streaming() || raw_out != rpc.method.is_server_streaming() {
            return Err("a stream is mapped to a body of raw bytes, and nothing else is".to_owned());
        }
        if raw_in && raw_out {
            return Err("streams in both directions".to_owned());
        }
        let route =
            Self { rpc: Arc::clone(rpc), template: path.clone(), request_body, response_body, fields };
        Ok((method, template.pattern, route))
    }
}

impl Body {
    fn new(name: &str, message: &prost_reflect::MessageDescriptor, absent: Self) -> Result<Self, String> {
        match name {
            "" => Ok(absent),
            "*" => Ok(Self::Message),
            name => {
                let field = message
                    .get_field_by_name(name)
                    .ok_or_else(|| format!("`{}` has no field `{name}`", message.full_name()))?;
                let raw = !field.is_list()
                    && matches!(field.kind(), Kind::Message(kind) if kind.full_name() == HTTP_BODY);
                Ok(if raw { Self::Raw(field) } else { Self::Field(field) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes() -> Routes {
        Routes::new(&Surface::load().unwrap()).unwrap()
    }

    fn found(method: Method, path: &str) -> (String, Vec<(String, String)>) {
        match routes().find(&method, path) {
            Match::Found(route, bound) => (
                route.rpc.method.full_name().to_owned(),
                bound.into_iter().map(|(field, value)| (field.name().to_owned(), value)).collect(),
            ),
            other => panic!("{method} {path}: {other:?}"),
        }
    }

    #[test]
    fn rules_and_their_additional_bindings_lead_to_their_rpc() {
        let id = ("sandbox_id".to_owned(), "sb-1".to_owned());
        assert_eq!(
            found(Method::POST, "/api/sandboxes"),
            ("oc.v1.SandboxService.CreateSandbox".to_owned(), vec![])
        );
        for prefix in ["/api", ""] {
            assert_eq!(
                found(Method::POST, &format!("{prefix}/sandboxes/sb-1/exec/run")),
                ("oc.v1.ExecService.Run".to_owned(), vec![id.clone()])
            );
            assert_eq!(
                found(Method::GET, &format!("{prefix}/sandboxes/sb-1/files/list")),
                ("oc.v1.FileService.ListDirectory".to_owned(), vec![id.clone()])
            );
        }
    }

    #[test]
    fn escapes_are_resolved_after_the_path_is_cut() {
        let (_, bound) = found(Method::GET, "/api/sandboxes/a%2Fb%20c%00");
        assert_eq!(bound, [("sandbox_id".to_owned(), "a/b c\0".to_owned())]);
        assert!(matches!(routes().find(&Method::GET, "/api/sandboxes/%ff"), Match::NotUtf8(_)));
    }

    #[test]
    fn a_wrong_method_says_which_are_right() {
        let Match::WrongMethod(mut methods) = routes().find(&Method::PATCH, "/api/sandboxes/sb-1/files")
        else {
            panic!("PATCH has no rule");
        };
        methods.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        assert_eq!(methods, [Method::DELETE, Method::GET, Method::PUT]);
        assert!(matches!(routes().find(&Method::GET, "/api/nothing"), Match::NotFound));
        assert!(matches!(routes().find(&Method::GET, "//api/sandboxes"), Match::NotFound));
    }
}

//! How the gateway is told what to do: flags, or variables of the environment.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::Parser;
use ipnet::IpNet;
use oc_mesh::host_name;

use crate::tls::Files;

/// The edge of a sandbox cloud: authentication, REST and gRPC on one port.
#[derive(Debug, Clone, Parser)]
#[command(name = "oc-gateway", version)]
pub struct Config {
    /// Record store: `file:///path/store.db` or `etcd://host:port[,host:port]`.
    #[arg(long, env = "OC_STORE", value_name = "URL")]
    pub store: String,

    /// Address and port to listen on; with port 0 the ready line and the member record say which was taken.
    #[arg(long, env = "OC_LISTEN", value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,

    /// URL that clients reach this gateway by, as in a sandbox's `connectURL`; `http://` and the address that it
    /// listens on where absent.
    #[arg(long, env = "OC_PUBLIC_URL", value_name = "URL", value_parser = public_url)]
    pub public_url: Option<String>,

    /// Name among the gateways; a random one where absent.
    #[arg(long, env = "OC_ID", value_name = "NAME")]
    pub id: Option<String>,

    /// Certificate chain, PEM: the gateway then speaks TLS alone. Read again when it changes.
    #[arg(long, env = "OC_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// Its key, PEM.
    #[arg(long, env = "OC_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Directory with a pair for each host name that has a certificate of its own: `NAME.crt` and `NAME.key`, `_.` for `*.`.
    #[arg(long, env = "OC_TLS_DIR", value_name = "DIR", requires = "tls_cert")]
    pub tls_dir: Option<PathBuf>,

    /// Domain under which ports of sandboxes are reached, as `{sandboxID}-p{port}.{domain}`. All names under it must lead to
    /// this gateway.
    #[arg(
        long,
        env = "OC_PREVIEW_DOMAIN",
        value_name = "DOMAIN",
        default_value = crate::preview::DEFAULT_DOMAIN,
        value_parser = domain
    )]
    pub preview_domain: String,

    /// Host names that are the mesh's own, separated by commas, each with every name below it: none of them is ever a preview's.
    /// Those of `--public-url`, `--preview-domain` and `localhost` are so without being named, and what the certificate of `--tls-cert`
    /// names in full, itself alone. Name all others that lead to this gateway and are no tenant's, here and to the schedulers.
    #[arg(
        long,
        env = "OC_OWN_NAMES",
        value_name = "NAMES",
        value_delimiter = ',',
        value_parser = host_name::option
    )]
    pub own_names: Vec<String>,

    /// Networks and addresses of proxies before this gateway, separated by commas. What they say in `X-Forwarded-*` goes on to ports,
    /// with them added; what anybody else says there does not.
    #[arg(
        long,
        env = "OC_TRUSTED_PROXIES",
        value_name = "CIDRS",
        value_delimiter = ',',
        value_parser = network
    )]
    pub trusted_proxies: Vec<IpNet>,

    /// Connections at the same time; more wait to be accepted.
    #[arg(long, env = "OC_MAX_CONNECTIONS", value_name = "N", default_value_t = 16_384)]
    pub max_connections: usize,

    /// Requests that are answered at the same time; more are refused as `OVERLOADED`.
    #[arg(long, env = "OC_MAX_REQUESTS", value_name = "N", default_value_t = 4096)]
    pub max_requests: usize,

    /// WebSockets at the same time; more are refused as `OVERLOADED`.
    #[arg(long, env = "OC_MAX_WEBSOCKETS", value_name = "N", default_value_t = 16_384)]
    pub max_websockets: usize,

    /// Origins whose pages may use this gateway from a browser, such as `https://console.example`, separated by commas;
    /// `*` for any. Its own is always among them. No ambient credential is ever read, so this is a second fence.
    #[arg(
        long,
        env = "OC_ALLOWED_ORIGINS",
        value_name = "ORIGINS",
        default_value = "*",
        value_delimiter = ','
    )]
    pub allowed_origins: Vec<String>,
}

impl Config {
    /// Where certificates are, if there are any.
    #[must_use]
    pub fn tls_files(&self) -> Option<Files> {
        let (certificate, key) = (self.tls_cert.clone()?, self.tls_key.clone()?);
        Some(Files { certificate, key, directory: self.tls_dir.clone() })
    }
}

/// An absolute `http` or `https` URL, without the slash at its end: paths are appended to it.
fn public_url(text: &str) -> Result<String, String> {
    let text = text.trim_end_matches('/');
    let uri: http::Uri = text.parse().map_err(|error| format!("{error}"))?;
    match (uri.scheme_str(), uri.authority(), uri.query()) {
        (Some("http" | "https"), Some(_), None) => Ok(text.to_owned()),
        _ => Err("must be an absolute http or https URL without a query".to_owned()),
    }
}

/// A network, or an address for a network of one.
fn network(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| "must be a network such as 10.0.0.0/8, or an address".to_owned())
}

/// A host name in lower case, that leaves room for a sandbox's ID and a port before it.
fn domain(text: &str) -> Result<String, String> {
    match text.len() <= 200 && host_name::is_host_name(text) {
        true => Ok(text.to_owned()),
        false => Err("must be a host name in lower case".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_names_are_host_names_in_any_case() {
        let told = |names: &str| {
            let arguments = ["oc-gateway", "--store", "file:///x", "--own-names", names];
            Config::try_parse_from(arguments).ok().map(|config| config.own_names)
        };
        let names = ["api.example", "b.example"].map(str::to_owned).to_vec();
        assert_eq!(told("API.example., b.Example"), Some(names));
        for wrong in ["*.example", "https://api.example", "api.example:443", "a..example"] {
            assert_eq!(told(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn networks_are_told_by_prefix_or_as_one_address() {
        let told = |proxies: &str| {
            let arguments = ["oc-gateway", "--store", "file:///x", "--trusted-proxies", proxies];
            Config::try_parse_from(arguments).ok().map(|config| config.trusted_proxies)
        };
        let networks =
            ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"].map(|network| network.parse().unwrap());
        assert_eq!(told("10.0.0.0/8,192.0.2.1,2001:db8::/32"), Some(networks.to_vec()));
        for wrong in ["10.0.0.0/33", "proxy.example", "10.0.0.0/8;::1"] {
            assert_eq!(told(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_public_url_is_absolute_and_loses_its_last_slash() {
        assert_eq!(public_url("https://a.example/base/").unwrap(), "https://a.example/base");
        for wrong in ["a.example", "/x", "ftp://a", "http://a/?x=1", ""] {
            assert!(public_url(wrong).is_err(), "{wrong}");
        }
    }
}

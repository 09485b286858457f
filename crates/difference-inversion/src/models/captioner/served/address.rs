//! The address of a server that writes captions.

use std::fmt::{self, Display};
use std::net::IpAddr;
use std::str::FromStr;

use crate::{Error, Result};

/// The interface's usual place on a server.
const USUAL_PATH: &str = "/v1";
/// What people copy with it.
const CHAT: &str = "/chat/completions";

/// Where a server offers its chat interface, and which of its models is meant: `http://HOST:PORT/v1#MODEL`.
///
/// The path is `/v1` where none is given. The model may be left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerAddress {
    /// Scheme, host, port and path, without a slash at the end.
    base: String,
    model: Option<String>,
}

impl ServerAddress {
    /// The address without the model.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The name of the model, if one is named.
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// The same address with this model.
    #[must_use]
    pub fn with_model(&self, model: impl Into<String>) -> Self {
        Self {
            model: Some(model.into()),
            ..self.clone()
        }
    }

    /// Whether nothing that is sent can be read on the way.
    pub fn is_encrypted(&self) -> bool {
        self.base.starts_with("https:")
    }

    /// The host with its port, if there is one.
    pub fn authority(&self) -> &str {
        let after = self.base.split_once("://").map_or("", |(_, rest)| rest);
        after.split('/').next().unwrap_or_default()
    }

    /// The host.
    pub fn host(&self) -> &str {
        let authority = self.authority();
        match authority.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => authority.split(':').next().unwrap_or_default(),
        }
    }

    /// Whether the server runs on this machine.
    pub fn is_loopback(&self) -> bool {
        let host = self.host();
        let address = host.parse::<IpAddr>();
        host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }
}

impl Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.base)?;
        self.model
            .iter()
            .try_for_each(|model| write!(f, "#{model}"))
    }
}

impl FromStr for ServerAddress {
    type Err = Error;

    /// Parses an address. Nothing secret may be in it, as records of runs repeat it.
    fn from_str(text: &str) -> Result<Self> {
        let (address, model) = match text.split_once('#') {
            Some((address, model)) => (address, Some(model)),
            None => (text, None),
        };
        let wrong = |expected: &str, found: &str| Error::Setting {
            name: "captioner",
            expected: expected.to_owned(),
            found: found.to_owned(),
        };
        let quoted = |text: &str| format!("`{}`", text.escape_debug());
        let example = "http://localhost:8080";
        let Some((scheme, rest)) = address.split_once("://") else {
            return Err(wrong(
                &format!("an address such as {example}"),
                &quoted(text),
            ));
        };
        let scheme = scheme.to_ascii_lowercase();
        if !["http", "https"].contains(&scheme.as_str()) {
            let expected = format!("http or https, as in {example}");
            return Err(wrong(&expected, &quoted(&scheme)));
        }
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        if authority.contains('@') {
            let expected =
                "an address without user and password (a key is read from DINV_CAPTIONER_KEY)";
            return Err(wrong(expected, "one with them"));
        }
        if path.contains('?') {
            let expected = format!("an address without a query, as {example}");
            return Err(wrong(&expected, "one with `?`"));
        }
        let is_plain = |c: char| c.is_ascii_graphic() && !"\\\"<>^`{|}".contains(c);
        if !is_authority(authority) || !path.chars().all(is_plain) {
            return Err(wrong(
                &format!("an address such as {example}"),
                &quoted(address),
            ));
        }
        let model = model.map(str::trim);
        if model.is_some_and(|model| model.is_empty() || model.contains(char::is_control)) {
            return Err(wrong(
                &format!("a model's name after `#`, as in {example}#NAME"),
                &quoted(text),
            ));
        }
        let path = path.trim_end_matches('/');
        let path = path.strip_suffix(CHAT).unwrap_or(path);
        let path = if path.is_empty() { USUAL_PATH } else { path };
        Ok(Self {
            base: format!("{scheme}://{}{path}", authority.to_ascii_lowercase()),
            model: model.map(str::to_owned),
        })
    }
}

/// Whether a text is a host, by name or by number, with or without a port.
fn is_authority(text: &str) -> bool {
    let is_port = |rest: &str| match rest.strip_prefix(':') {
        Some(port) => port.parse::<u16>().is_ok_and(|port| port > 0),
        None => rest.is_empty(),
    };
    if let Some(rest) = text.strip_prefix('[') {
        let parts = rest.split_once(']');
        return parts.is_some_and(|(host, rest)| {
            matches!(host.parse(), Ok(IpAddr::V6(_))) && is_port(rest)
        });
    }
    let (host, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
    let of_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    !host.is_empty() && host.chars().all(of_name) && is_port(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        text.parse::<ServerAddress>().unwrap().to_string()
    }

    #[test]
    fn an_address_is_completed() {
        for text in [
            "http://localhost:8080",
            "http://localhost:8080/",
            "HTTP://LocalHost:8080/v1",
            "http://localhost:8080/v1/",
            "http://localhost:8080/v1/chat/completions",
        ] {
            assert_eq!(shown(text), "http://localhost:8080/v1", "{text}");
        }
        assert_eq!(
            shown("https://box.lan/api/v3#Qwen/Qwen2.5-VL-7B-Instruct"),
            "https://box.lan/api/v3#Qwen/Qwen2.5-VL-7B-Instruct"
        );
        let ollama: ServerAddress = "http://[::1]:11434#qwen2.5vl:7b".parse().unwrap();
        assert_eq!(ollama.base(), "http://[::1]:11434/v1");
        assert_eq!(ollama.model(), Some("qwen2.5vl:7b"));
        assert_eq!((ollama.authority(), ollama.host()), ("[::1]:11434", "::1"));
    }

    #[test]
    fn this_machine_is_told_from_others() {
        let is_loopback = |text: &str| text.parse::<ServerAddress>().unwrap().is_loopback();
        for text in [
            "http://localhost",
            "http://127.0.0.1:1",
            "http://127.8.0.1",
            "http://[::1]:1",
        ] {
            assert!(is_loopback(text), "{text}");
        }
        for text in [
            "http://localhost.example.com",
            "http://127.0.0.1.example.com",
            "http://192.168.0.2",
            "http://0.0.0.0:8080",
            "http://[fe80::1]",
        ] {
            assert!(!is_loopback(text), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for (text, expected) in [
            (
                "ftp://host",
                "expected http or https, as in http://localhost:8080, found `ftp`",
            ),
            (
                "localhost:8080",
                "expected an address such as http://localhost:8080, found `localhost:8080`",
            ),
            ("http://", "expected an address such as"),
            ("http://:8080", "expected an address such as"),
            ("http://host:port", "expected an address such as"),
            ("http://host:0", "expected an address such as"),
            ("http://host:99999", "expected an address such as"),
            ("http://[::1", "expected an address such as"),
            ("http://[host]:1", "expected an address such as"),
            ("http://ho st", "expected an address such as"),
            ("http://host/a b", "expected an address such as"),
            ("http://host\\evil/", "expected an address such as"),
            ("http://host/v1\r\nx: y", "expected an address such as"),
            (
                "http://host/v1?key=1",
                "expected an address without a query",
            ),
            ("http://host#", "expected a model's name after `#`"),
            ("http://host# ", "expected a model's name after `#`"),
        ] {
            let error = text.parse::<ServerAddress>().unwrap_err().to_string();
            assert!(error.starts_with("setting `captioner`: "), "{error}");
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_password_is_refused_and_not_repeated() {
        for text in [
            "http://me:secret@host/v1",
            "https://secret@host",
            "http://host:secret@evil#m",
        ] {
            let error = text.parse::<ServerAddress>().unwrap_err().to_string();
            assert!(error.contains("without user and password"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}

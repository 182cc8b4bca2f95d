//! Which cluster the command line talks to, and as whom.
//!
//! A file with three lines (`url`, `ca`, `token`), and environment variables that overrule each of them. The token is
//! a secret: the file is made readable for its owner alone, and one that others can read is named.

use std::env;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use berth_model::{Problem, ProblemCode};
use serde::{Deserialize, Serialize};

use crate::exit::Failure;

/// Where the manager listens unless told otherwise.
pub const DEFAULT_PORT: u16 = 8443;
/// The file in that directory.
pub const FILE_NAME: &str = "config.toml";

/// What stands in the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// The manager: `https://host:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// File with the cluster's CA certificate in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// The bearer token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// All that is needed to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `host:port` of the manager.
    pub address: String,
    /// The cluster's CA certificate in PEM.
    pub ca_pem: String,
    /// The bearer token, if there is one.
    pub token: Option<String>,
    /// A file that should be mended, and how.
    pub warning: Option<String>,
}

/// What the environment says; a value, so that tests need not change their own.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `BERTH_URL`.
    pub url: Option<String>,
    /// `BERTH_CA`.
    pub ca: Option<PathBuf>,
    /// `BERTH_TOKEN`.
    pub token: Option<String>,
    /// The file to read, and whether somebody asked for exactly this one.
    pub file: Option<(PathBuf, bool)>,
}

impl Environment {
    /// Reads the environment of this process.
    pub fn read() -> Self {
        let text = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let file = match env::var_os("BERTH_CONFIG").filter(|value| !value.is_empty()) {
            Some(file) => Some((PathBuf::from(file), true)),
            None => directory().map(|directory| (directory.join(FILE_NAME), false)),
        };
        Self {
            url: text("BERTH_URL"),
            ca: text("BERTH_CA").map(PathBuf::from),
            token: text("BERTH_TOKEN"),
            file,
        }
    }
}

/// The directory of the command line's own files: `BERTH_CONTEXT`, else `berth` in the user's configuration.
pub fn directory() -> Option<PathBuf> {
    let path = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    path("BERTH_CONTEXT")
        .or_else(|| path("XDG_CONFIG_HOME").map(|base| base.join("berth")))
        .or_else(|| path("HOME").map(|home| home.join(".config/berth")))
}

/// What stands in a file, if there is one that can be understood, with its CA's path as it is from here.
pub fn known(path: &Path) -> ConfigFile {
    load(path, false).map(|(file, _)| file).unwrap_or_default()
}

/// Takes the token out of a file, if there is one.
///
/// # Errors
/// When it can't be written.
pub fn forget_token(path: &Path) -> Result<()> {
    let Ok(text) = fs::read_to_string(path) else { return Ok(()) };
    let file: ConfigFile = toml::from_str(&text).unwrap_or_default();
    if file.token.is_none() {
        return Ok(());
    }
    save(path, &ConfigFile { token: None, ..file })
}

/// Puts file and environment together.
///
/// # Errors
/// When something is missing or can't be read: what, and what to do.
pub fn resolve(environment: &Environment) -> Result<Config, Failure> {
    let (file, warning) = match &environment.file {
        Some((path, wanted)) => load(path, *wanted)?,
        None => (ConfigFile::default(), None),
    };
    let url = environment.url.clone().or(file.url).ok_or_else(|| {
        Problem::new(
            ProblemCode::InvalidInput,
            "it is not known which cluster to talk to: run 'berth login', set BERTH_CONFIG or BERTH_URL, \
             or try one on this machine with 'berth up'",
        )
    })?;
    let ca = environment.ca.clone().or(file.ca).ok_or_else(|| {
        Problem::new(
            ProblemCode::InvalidInput,
            "the cluster's CA certificate is not known: run 'berth login', or set BERTH_CA to its file",
        )
    })?;
    let ca_pem = fs::read_to_string(&ca)
        .map_err(|error| Failure::field("ca", ca.display(), &format!("a file that can be read ({error})")))?;
    let token = environment.token.clone().or(file.token);
    Ok(Config { address: address_of(&url)?, ca_pem, token, warning })
}

fn load(path: &Path, wanted: bool) -> Result<(ConfigFile, Option<String>), Failure> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !wanted => {
            return Ok((ConfigFile::default(), None));
        }
        Err(error) => {
            let expected = format!("a file that can be read ({error})");
            return Err(Failure::field("BERTH_CONFIG", path.display(), &expected));
        }
    };
    let mut file: ConfigFile = toml::from_str(&text).map_err(|error| {
        Failure::field(
            "configuration",
            path.display(),
            &format!("url, ca and token in TOML ({})", error.message()),
        )
    })?;
    // A relative CA is beside the file that names it, wherever one stands.
    if let (Some(ca), Some(directory)) = (&file.ca, path.parent())
        && ca.is_relative()
    {
        file.ca = Some(directory.join(ca));
    }
    let warning = (file.token.is_some() && readable_by_others(path))
        .then(|| format!("warning: others can read the token in {}: chmod 600 it", path.display()));
    Ok((file, warning))
}

fn readable_by_others(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

/// `host:port` of a URL.
///
/// # Errors
/// When it is not one of a manager.
pub fn address_of(url: &str) -> Result<String, Failure> {
    let wrong = || Failure::field("url", url, "https://HOST[:PORT]");
    let rest = url.strip_prefix("https://").ok_or_else(wrong)?.trim_end_matches('/');
    if rest.is_empty() || rest.contains(['/', '?', '#', '@', ' ']) {
        return Err(wrong());
    }
    let (host, port) = match rest.rsplit_once(':') {
        // The colons of an IPv6 address stand in brackets.
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| wrong())?),
        _ => (rest, DEFAULT_PORT),
    };
    if host.is_empty() || (host.contains(':') && !(host.starts_with('[') && host.ends_with(']'))) {
        return Err(wrong());
    }
    Ok(format!("{host}:{port}"))
}

/// Writes a configuration, readable for its owner alone, in the place of what stood there.
///
/// # Errors
/// When it can't be written.
pub fn save(path: &Path, file: &ConfigFile) -> Result<()> {
    let text = toml::to_string(file).context("the configuration can't be written as TOML")?;
    write_private(path, text.as_bytes())
}

/// Makes a directory that only its owner can enter, unless it is there.
///
/// # Errors
/// When it can't be made.
pub fn make_private_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("{} can't be made", path.display()))
}

/// Writes a file that only its owner can read, whole or not at all.
///
/// # Errors
/// When it can't be written.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = || format!("{} can't be written", path.display());
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).with_context(failed)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let new = directory.join(name);
    let result = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&new, path));
    if result.is_err() {
        let _ = fs::remove_file(&new);
    }
    result.with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_give_addresses_and_nonsense_is_refused() {
        for (url, address) in [
            ("https://berth.example", "berth.example:8443"),
            ("https://198.18.0.1:9000/", "198.18.0.1:9000"),
            ("https://[::1]:8443", "[::1]:8443"),
            ("https://[::1]", "[::1]:8443"),
        ] {
            assert_eq!(address_of(url).expect(url), address);
        }
        for url in [
            "",
            "http://a",
            "a:8443",
            "https://",
            "https://a/b",
            "https://u@a",
            "https://a:99999",
            "https://::1",
        ] {
            assert_eq!(address_of(url).expect_err(url).code(), 2, "{url}");
        }
    }

    #[test]
    fn the_file_is_for_its_owner_alone_and_reads_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("deep/config.toml");
        fs::write(directory.path().join("ca.pem"), "PEM").expect("written");
        let ca = Some(directory.path().join("ca.pem"));
        let file = ConfigFile { url: Some("https://a:1".into()), ca, token: Some("secret".into()) };
        save(&path, &file).expect("saved");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        let read =
            resolve(&Environment { file: Some((path, true)), ..Environment::default() }).expect("resolved");
        let expected = Config {
            address: "a:1".into(),
            ca_pem: "PEM".into(),
            token: Some("secret".into()),
            warning: None,
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn the_environment_overrules_the_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("client.toml");
        fs::write(&path, "url = \"https://a:1\"\nca = \"ca.pem\"\ntoken = \"one\"\n").expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("opened");
        fs::write(directory.path().join("ca.pem"), "PEM").expect("written");
        let environment = Environment {
            url: Some("https://b:2".into()),
            token: Some("two".into()),
            file: Some((path, true)),
            ..Environment::default()
        };
        let read = resolve(&environment).expect("resolved");
        assert_eq!((read.address.as_str(), read.token.as_deref()), ("b:2", Some("two")));
        assert!(read.warning.expect("others can read it").contains("chmod 600"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let nothing = resolve(&Environment::default()).expect_err("nothing is known");
        assert!(nothing.problem().expect("a problem").message.contains("berth login"));
        let gone =
            Environment { file: Some(("/nonexistent/client.toml".into(), true)), ..Environment::default() };
        assert_eq!(resolve(&gone).expect_err("no file").code(), 2);
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("client.toml");
        fs::write(&path, "url = 7\n").expect("written");
        let nonsense = Environment { file: Some((path, true)), ..Environment::default() };
        assert_eq!(resolve(&nonsense).expect_err("nonsense").code(), 2);
    }
}

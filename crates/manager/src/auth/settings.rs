//! How people log in: `login.toml`, named in the manager's own configuration.
//!
//! Secrets never stand in it; it names files that hold them, which only their owner may be able to read. What is
//! wrong is said with the file, the key, the value and what was expected, before the manager starts.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_model::name::Name;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Deserialize;

/// How long a session lives unused when nothing is said, in seconds: a working day with its breaks.
pub const IDLE_S_DEFAULT: u64 = 8 * 3600;
/// How long a session lives at all when nothing is said, in seconds: everybody proves who they are once a day.
pub const ABSOLUTE_S_DEFAULT: u64 = 24 * 3600;
/// Longest life of a session that can be set, in seconds.
const ABSOLUTE_S_MAX: u64 = 30 * 24 * 3600;
/// The authorities that Debian and Ubuntu trust.
const CA_FILE_DEFAULT: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Largest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// A configuration that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {key} is '{value}': expected {expected}", file.display())]
pub struct SettingsError {
    /// The file.
    pub file: PathBuf,
    /// The key, as in `oidc.0.issuer`.
    pub key: String,
    /// What stands there.
    pub value: String,
    /// What was expected.
    pub expected: String,
}

/// A secret that was read from a file. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Secret(…)")
    }
}

impl Secret {
    /// This text.
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// The text, for who it is meant for.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// How people log in.
#[derive(Debug, Clone)]
pub struct LoginSettings {
    /// How long a session lives unused, in seconds.
    pub idle_s: u64,
    /// How long a session lives at all, in seconds.
    pub absolute_s: u64,
    /// Providers of OpenID Connect.
    pub oidc: Vec<OidcSettings>,
    /// Directories.
    pub ldap: Vec<LdapSettings>,
}

impl Default for LoginSettings {
    fn default() -> Self {
        Self { idle_s: IDLE_S_DEFAULT, absolute_s: ABSOLUTE_S_DEFAULT, oidc: Vec::new(), ldap: Vec::new() }
    }
}

/// A provider of OpenID Connect.
#[derive(Debug, Clone)]
pub struct OidcSettings {
    /// What it is called here.
    pub name: Name,
    /// Its issuer, exactly as it stands in its tokens.
    pub issuer: String,
    /// What this cluster is called there.
    pub client_id: String,
    /// What this cluster proves itself with; none: it is a public client.
    pub client_secret: Option<Secret>,
    /// Where browsers come back to, exactly as it is registered there; none: device flow only.
    pub redirect_uri: Option<String>,
    /// What is asked for.
    pub scopes: Vec<String>,
    /// The claim that lists groups.
    pub groups_claim: String,
    /// The claim that names of new users are made of.
    pub name_claim: String,
    /// Whether who is not known yet becomes a user.
    pub create_users: bool,
    /// The signature algorithms that are taken.
    pub algorithms: Vec<String>,
    /// Whom its certificate must come from.
    pub roots: Roots,
}

/// A directory.
#[derive(Debug, Clone)]
pub struct LdapSettings {
    /// What it is called here.
    pub name: Name,
    /// `ldaps://host[:port]`, or `ldap://host[:port]` with StartTLS.
    pub url: String,
    /// Whether TLS begins after the connection.
    pub start_tls: bool,
    /// Who searches.
    pub bind_dn: String,
    /// With which password.
    pub bind_password: Secret,
    /// Below what users are.
    pub user_base: String,
    /// Which of them: `{name}` stands for the escaped name.
    pub user_filter: String,
    /// The attribute that names of new users are made of.
    pub name_attribute: String,
    /// The attribute that says who somebody is, whatever the name.
    pub id_attribute: String,
    /// Below what groups are; none: groups don't matter.
    pub group_base: Option<String>,
    /// A group's attribute that lists members' names.
    pub member_attribute: String,
    /// How many groups deep.
    pub group_depth_max: u32,
    /// How many groups at most.
    pub groups_max: u32,
    /// Whether who is not known yet becomes a user.
    pub create_users: bool,
    /// Whom its certificate must come from.
    pub roots: Roots,
}

/// Certificate authorities.
#[derive(Debug, Clone)]
pub struct Roots(pub Arc<rustls::RootCertStore>);

impl Roots {
    /// What a TLS client needs that trusts these and no others.
    pub fn client(&self) -> Arc<rustls::ClientConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring speaks TLS 1.2 and 1.3")
            .with_root_certificates(Arc::clone(&self.0))
            .with_no_client_auth();
        Arc::new(config)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    session: SessionTable,
    oidc: Vec<OidcTable>,
    ldap: Vec<LdapTable>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct SessionTable {
    idle_s: u64,
    absolute_s: u64,
}

impl Default for SessionTable {
    fn default() -> Self {
        Self { idle_s: IDLE_S_DEFAULT, absolute_s: ABSOLUTE_S_DEFAULT }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OidcTable {
    name: String,
    issuer: String,
    client_id: String,
    client_secret_file: Option<PathBuf>,
    redirect_uri: Option<String>,
    #[serde(default = "scopes")]
    scopes: Vec<String>,
    #[serde(default = "groups_claim")]
    groups_claim: String,
    #[serde(default = "name_claim")]
    name_claim: String,
    #[serde(default)]
    create_users: bool,
    #[serde(default = "algorithms")]
    algorithms: Vec<String>,
    ca_file: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LdapTable {
    name: String,
    url: String,
    #[serde(default)]
    start_tls: bool,
    bind_dn: String,
    bind_password_file: PathBuf,
    user_base: String,
    #[serde(default = "user_filter")]
    user_filter: String,
    #[serde(default = "name_attribute")]
    name_attribute: String,
    #[serde(default = "id_attribute")]
    id_attribute: String,
    group_base: Option<String>,
    #[serde(default = "member_attribute")]
    member_attribute: String,
    #[serde(default = "group_depth_max")]
    group_depth_max: u32,
    #[serde(default = "groups_max")]
    groups_max: u32,
    #[serde(default)]
    create_users: bool,
    ca_file: Option<PathBuf>,
}

fn scopes() -> Vec<String> {
    ["openid", "profile", "groups"].map(str::to_owned).to_vec()
}
fn algorithms() -> Vec<String> {
    ["RS256", "ES256", "EdDSA"].map(str::to_owned).to_vec()
}
fn groups_claim() -> String {
    "groups".to_owned()
}
fn name_claim() -> String {
    "preferred_username".to_owned()
}
fn user_filter() -> String {
    "(&(objectClass=person)(uid={name}))".to_owned()
}
fn name_attribute() -> String {
    "uid".to_owned()
}
fn id_attribute() -> String {
    "entryUUID".to_owned()
}
fn member_attribute() -> String {
    "member".to_owned()
}
const fn group_depth_max() -> u32 {
    8
}
const fn groups_max() -> u32 {
    500
}

/// Says what is wrong, in which file.
struct Reader<'a> {
    file: &'a Path,
}

impl LoginSettings {
    /// Reads `login.toml`.
    ///
    /// # Errors
    /// What is wrong, where, and what was expected.
    pub fn load(path: &Path) -> Result<Self, SettingsError> {
        let reader = Reader { file: path };
        let unreadable = |error: std::io::Error| {
            reader.wrong("login", path.display(), format!("a file that can be read ({error})"))
        };
        let text = fs::read_to_string(path).map_err(unreadable)?;
        let file: File = toml::from_str(&text).map_err(|error| reader.misread(&text, &error))?;
        let session = file.session;
        if session.absolute_s == 0 || session.absolute_s > ABSOLUTE_S_MAX {
            let expected = format!("1 to {ABSOLUTE_S_MAX} seconds");
            return Err(reader.wrong("session.absolute_s", session.absolute_s, expected));
        }
        if session.idle_s == 0 || session.idle_s > session.absolute_s {
            let expected = format!("1 to {} seconds, the whole life of a session", session.absolute_s);
            return Err(reader.wrong("session.idle_s", session.idle_s, expected));
        }
        let oidc: Vec<OidcSettings> = file
            .oidc
            .into_iter()
            .enumerate()
            .map(|(index, table)| reader.oidc(index, table))
            .collect::<Result<_, _>>()?;
        let ldap: Vec<LdapSettings> = file
            .ldap
            .into_iter()
            .enumerate()
            .map(|(index, table)| reader.ldap(index, table))
            .collect::<Result<_, _>>()?;
        let mut names: Vec<&Name> =
            oidc.iter().map(|one| &one.name).chain(ldap.iter().map(|one| &one.name)).collect();
        names.sort();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(reader.wrong(
                "name",
                twice[0],
                "a name that no other provider or directory has".to_owned(),
            ));
        }
        Ok(Self { idle_s: session.idle_s, absolute_s: session.absolute_s, oidc, ldap })
    }
}

impl Reader<'_> {
    fn wrong(&self, key: &str, value: impl ToString, expected: String) -> SettingsError {
        SettingsError { file: self.file.to_owned(), key: key.to_owned(), value: value.to_string(), expected }
    }

    /// Where TOML is at fault: the line is the value, unless a secret may stand in it.
    fn misread(&self, text: &str, error: &toml::de::Error) -> SettingsError {
        let line =
            error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let key =
            text.lines().nth(line - 1).and_then(|line| line.split('=').next()).unwrap_or_default().trim();
        self.wrong(key, format!("line {line}"), error.message().to_owned())
    }

    fn oidc(&self, index: usize, table: OidcTable) -> Result<OidcSettings, SettingsError> {
        let key = |name: &str| format!("oidc.{index}.{name}");
        self.https(&key("issuer"), &table.issuer)?;
        if let Some(uri) = &table.redirect_uri {
            self.https(&key("redirect_uri"), uri)?;
            let ending = format!("/v1/login/oidc/{}/callback", table.name);
            if !uri.ends_with(&ending) {
                return Err(self.wrong(&key("redirect_uri"), uri, format!("https://MANAGER{ending}")));
            }
        }
        if !table.scopes.iter().any(|scope| scope == "openid") {
            return Err(self.wrong(&key("scopes"), table.scopes.join(" "), "openid among them".to_owned()));
        }
        let known = super::oidc::ALGORITHMS;
        if let Some(other) = table.algorithms.iter().find(|one| !known.contains(&one.as_str())) {
            return Err(self.wrong(&key("algorithms"), other, format!("some of: {}", known.join(", "))));
        }
        let secret = table.client_secret_file.map(|file| self.secret(&key("client_secret_file"), &file));
        Ok(OidcSettings {
            name: self.name(&key("name"), &table.name)?,
            issuer: table.issuer,
            client_id: table.client_id,
            client_secret: secret.transpose()?,
            redirect_uri: table.redirect_uri,
            scopes: table.scopes,
            groups_claim: table.groups_claim,
            name_claim: table.name_claim,
            create_users: table.create_users,
            algorithms: table.algorithms,
            roots: self.roots(&key("ca_file"), table.ca_file)?,
        })
    }

    fn ldap(&self, index: usize, table: LdapTable) -> Result<LdapSettings, SettingsError> {
        let key = |name: &str| format!("ldap.{index}.{name}");
        let scheme = if table.start_tls { "ldap://" } else { "ldaps://" };
        if !table.url.starts_with(scheme) {
            let expected =
                "ldaps://HOST, or ldap://HOST with start_tls = true: passwords don't travel in the clear";
            return Err(self.wrong(&key("url"), &table.url, expected.to_owned()));
        }
        if !table.user_filter.contains("{name}") {
            return Err(self.wrong(&key("user_filter"), &table.user_filter, "{name} in it".to_owned()));
        }
        Ok(LdapSettings {
            name: self.name(&key("name"), &table.name)?,
            url: table.url,
            start_tls: table.start_tls,
            bind_dn: table.bind_dn,
            bind_password: self.secret(&key("bind_password_file"), &table.bind_password_file)?,
            user_base: table.user_base,
            user_filter: table.user_filter,
            name_attribute: table.name_attribute,
            id_attribute: table.id_attribute,
            group_base: table.group_base,
            member_attribute: table.member_attribute,
            group_depth_max: table.group_depth_max,
            groups_max: table.groups_max,
            create_users: table.create_users,
            roots: self.roots(&key("ca_file"), table.ca_file)?,
        })
    }

    fn name(&self, key: &str, text: &str) -> Result<Name, SettingsError> {
        text.parse().map_err(|error| self.wrong(key, text, format!("a name ({error})")))
    }

    fn https(&self, key: &str, text: &str) -> Result<(), SettingsError> {
        let uri: Option<http::Uri> = text.parse().ok();
        let good = uri.is_some_and(|uri| {
            uri.scheme_str() == Some("https") && uri.host().is_some() && uri.query().is_none()
        });
        if good { Ok(()) } else { Err(self.wrong(key, text, "https://HOST…, without a query".to_owned())) }
    }

    /// A path beside the file that names it, unless it is absolute.
    fn beside(&self, path: &Path) -> PathBuf {
        self.file.parent().unwrap_or(Path::new(".")).join(path)
    }

    fn read(&self, key: &str, path: &Path) -> Result<String, SettingsError> {
        let unreadable = |error: std::io::Error| {
            self.wrong(key, path.display(), format!("a file that can be read ({error})"))
        };
        let found = fs::metadata(path).map_err(unreadable)?;
        if found.len() > FILE_BYTES_MAX {
            return Err(self.wrong(key, path.display(), format!("a file of at most {FILE_BYTES_MAX} bytes")));
        }
        fs::read_to_string(path).map_err(unreadable)
    }

    fn secret(&self, key: &str, path: &Path) -> Result<Secret, SettingsError> {
        let path = self.beside(path);
        let text = self.read(key, &path)?;
        let mode = fs::metadata(&path).map_or(0o777, |found| found.mode());
        if mode & 0o077 != 0 {
            let expected =
                format!("a file that only its owner can read (mode 0600, not {:04o})", mode & 0o7777);
            return Err(self.wrong(key, path.display(), expected));
        }
        let text = text.trim_end_matches(['\r', '\n']).to_owned();
        if text.is_empty() {
            return Err(self.wrong(key, path.display(), "a file with a secret in it".to_owned()));
        }
        Ok(Secret(text))
    }

    fn roots(&self, key: &str, path: Option<PathBuf>) -> Result<Roots, SettingsError> {
        let path = path.map_or_else(|| PathBuf::from(CA_FILE_DEFAULT), |path| self.beside(&path));
        let text = self.read(key, &path)?;
        let mut roots = rustls::RootCertStore::empty();
        let certificates = CertificateDer::pem_slice_iter(text.as_bytes()).filter_map(Result::ok);
        roots.add_parsable_certificates(certificates);
        if roots.is_empty() {
            return Err(self.wrong(key, path.display(), "certificates of authorities in PEM".to_owned()));
        }
        Ok(Roots(Arc::new(roots)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const LDAP: &str = "[[ldap]]\nname = \"office\"\nurl = \"ldaps://a\"\nbind_dn = \"cn=x\"\n\
                        bind_password_file = \"secret\"\nuser_base = \"dc=x\"\nca_file = \"ca.pem\"\n";
    const OIDC: &str =
        "[[oidc]]\nname = \"corp\"\nissuer = \"https://a\"\nclient_id = \"berth\"\nca_file = \"ca.pem\"\n";

    fn load(text: &str, mode: u32) -> Result<LoginSettings, SettingsError> {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let ca = berth_api::pki::Authority::create(1_800_000_000).expect("a CA");
        fs::write(at("ca.pem"), ca.certificate_pem).expect("written");
        fs::write(at("secret"), "hunter2hunter2\n").expect("written");
        fs::set_permissions(at("secret"), fs::Permissions::from_mode(mode)).expect("set");
        fs::write(at("login.toml"), text).expect("written");
        LoginSettings::load(&at("login.toml"))
    }

    #[test]
    fn what_is_left_out_has_its_default_and_secrets_are_not_shown() {
        let settings = load(&format!("{LDAP}{OIDC}"), 0o600).expect("good");
        assert_eq!((settings.idle_s, settings.absolute_s), (IDLE_S_DEFAULT, ABSOLUTE_S_DEFAULT));
        assert_eq!(settings.ldap[0].bind_password.reveal(), "hunter2hunter2");
        assert!(!settings.ldap[0].create_users && !settings.oidc[0].create_users);
        assert!(!format!("{settings:?}").contains("hunter2"));
        let empty = load("", 0o600).expect("good");
        assert!(empty.oidc.is_empty() && empty.ldap.is_empty());
    }

    #[test]
    fn what_is_wrong_is_said_with_key_value_and_expectation() {
        for (text, mode, key) in [
            (LDAP.to_owned(), 0o640, "ldap.0.bind_password_file"),
            (LDAP.replace("ldaps://a", "ldap://a"), 0o600, "ldap.0.url"),
            (LDAP.replace("ca.pem", "nowhere.pem"), 0o600, "ldap.0.ca_file"),
            (LDAP.replace("ca.pem", "secret"), 0o600, "ldap.0.ca_file"),
            (LDAP.replace("office", "Of Fice"), 0o600, "ldap.0.name"),
            (format!("{LDAP}user_filter = \"(uid=x)\"\n"), 0o600, "ldap.0.user_filter"),
            (format!("{LDAP}usr_filter = \"(uid=x)\"\n"), 0o600, "usr_filter"),
            (OIDC.replace("https://a", "http://a"), 0o600, "oidc.0.issuer"),
            (format!("{OIDC}algorithms = [\"none\"]\n"), 0o600, "oidc.0.algorithms"),
            (format!("{OIDC}algorithms = [\"HS256\"]\n"), 0o600, "oidc.0.algorithms"),
            (format!("{OIDC}redirect_uri = \"https://evil.example/\"\n"), 0o600, "oidc.0.redirect_uri"),
            (format!("{OIDC}scopes = [\"profile\"]\n"), 0o600, "oidc.0.scopes"),
            (format!("{OIDC}{}", OIDC), 0o600, "name"),
            ("[session]\nidle_s = 0\n".to_owned(), 0o600, "session.idle_s"),
            ("[session]\nabsolute_s = 99999999\n".to_owned(), 0o600, "session.absolute_s"),
        ] {
            let error = load(&text, mode).expect_err(&text);
            assert_eq!(error.key, key, "{error}");
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }
}

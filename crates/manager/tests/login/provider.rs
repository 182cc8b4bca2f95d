//! The certified `oidc-provider`, fetched as its lock file says into the target directory, and a browser of sorts.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use berth_api::tls;
use berth_api::transport::{self, TlsTransport};
use http::Request;
use http::header::{CONTENT_TYPE, COOKIE, LOCATION, SET_COOKIE};
use serde_json::Value;

use super::support::{Authority, Got, World, free_port, got};

const PACKAGE: &str = include_str!("provider/package.json");
const LOCK: &str = include_str!("provider/package-lock.json");
const PROGRAM: &str = include_str!("provider/provider.mjs");
/// Most redirects and forms of one way through the provider.
const STEPS_MAX: usize = 20;

/// Where the packages are: fetched once, by whichever test comes first.
fn packages() -> PathBuf {
    let base = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let digest: String = {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        (PACKAGE, LOCK).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    };
    let ready = base.join(format!("identity-provider-{digest}"));
    fs::create_dir_all(base).expect("made");
    let turn = fs::File::create(base.join("identity-provider.lock")).expect("a lock file");
    rustix::fs::flock(&turn, rustix::fs::FlockOperation::LockExclusive).expect("a turn");
    if !ready.join("node_modules").exists() {
        let new = tempfile::tempdir_in(base).expect("a directory");
        fs::write(new.path().join("package.json"), PACKAGE).expect("written");
        fs::write(new.path().join("package-lock.json"), LOCK).expect("written");
        let fetched = Command::new("npm")
            .args(["ci", "--no-audit", "--no-fund", "--ignore-scripts"])
            .current_dir(new.path())
            .output()
            .expect("scripts/deps.sh installs npm");
        assert!(fetched.status.success(), "npm ci: {}", String::from_utf8_lossy(&fetched.stderr));
        let _ = fs::remove_dir_all(&ready);
        fs::rename(new.keep(), &ready).expect("moved");
    }
    // Always the program of this build, in the place that its imports are looked for from.
    let program = ready.join("provider.mjs");
    if fs::read_to_string(&program).ok().as_deref() != Some(PROGRAM) {
        fs::write(&program, PROGRAM).expect("written");
    }
    ready
}

/// A provider with a manager that trusts it.
pub struct Provider {
    pub world: World,
    pub issuer: String,
    _authority: Authority,
    child: Child,
    tls: Arc<rustls::ClientConfig>,
    address: String,
}

impl Drop for Provider {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Provider {
    /// With these people (`{"id": {"name": …, "groups": […]}}`) and these lines of `login.toml`.
    pub async fn start(people: Value, in_token: bool, more: &str) -> Self {
        let authority = Authority::new();
        let port = free_port();
        let redirect = format!("https://localhost:{port}/v1/login/oidc/corp/callback");
        let mut child = Command::new("node")
            .arg(packages().join("provider.mjs"))
            .args([authority.path("server.pem"), authority.path("server.key")])
            .arg(&redirect)
            .env("PEOPLE", people.to_string())
            .env("IN_TOKEN", if in_token { "yes" } else { "no" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("scripts/deps.sh installs nodejs");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
        let said = lines.find_map(|line| line.strip_prefix("PORT ").map(str::to_owned));
        // It says more later, and dies of a pipe that nobody reads.
        std::thread::spawn(move || lines.for_each(drop));
        let provider_port = said.expect("the provider comes up");
        let issuer = format!("https://localhost:{provider_port}");
        authority.write("client.secret", "a secret of the test: 100% + / &\n");
        let table = format!(
            "[[oidc]]\nname = \"corp\"\nissuer = \"{issuer}\"\nclient_id = \"berth\"\n\
             client_secret_file = \"{}\"\nca_file = \"{}\"\nredirect_uri = \"{redirect}\"\n{more}\n",
            authority.path("client.secret").display(),
            authority.path("ca.pem").display(),
        );
        let world = World::new(port, &table).await;
        let tls = tls::client_config(&authority.ca_pem, None).expect("TLS");
        let address = format!("localhost:{provider_port}");
        Self { world, issuer, _authority: authority, child, tls, address }
    }

    pub fn browser(&self) -> Browser<'_> {
        Browser { provider: self, cookies: BTreeMap::new() }
    }
}

/// What a browser does: keeps cookies, follows redirects, fills in the forms of the provider.
pub struct Browser<'a> {
    provider: &'a Provider,
    cookies: BTreeMap<String, String>,
}

impl Browser<'_> {
    async fn ask(&mut self, method: &str, url: &str, form: Option<&[(&str, &str)]>) -> Got {
        let path = url.strip_prefix(&self.provider.issuer).unwrap_or(url);
        assert!(path.starts_with('/'), "not of the provider: {url}");
        let cookies: Vec<String> =
            self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut request = Request::builder().method(method).uri(path).header(COOKIE, cookies.join("; "));
        let body = match form {
            Some(fields) => {
                request = request.header(CONTENT_TYPE, "application/x-www-form-urlencoded");
                transport::full(serde_urlencoded::to_string(fields).expect("a form"))
            }
            None => transport::empty(),
        };
        let name = tls::server_name("localhost").expect("a name");
        let transport =
            TlsTransport::new(self.provider.address.clone(), name, Arc::clone(&self.provider.tls));
        let answer = got(&transport, request.body(body).expect("a request")).await;
        for cookie in answer.headers.get_all(SET_COOKIE) {
            let text = cookie.to_str().expect("a cookie");
            let pair = text.split(';').next().unwrap_or_default();
            if let Some((name, value)) = pair.split_once('=') {
                if value.is_empty() {
                    self.cookies.remove(name);
                } else {
                    self.cookies.insert(name.to_owned(), value.to_owned());
                }
            }
        }
        answer
    }

    /// Goes to an address of the provider and says whatever it wants to hear, as this person, to the end: the address
    /// outside it that it sends the browser to, or the text of its last page.
    pub async fn sign_in(&mut self, url: &str, person: &str) -> String {
        let mut answer = self.ask("GET", url, None).await;
        for _ in 0..STEPS_MAX {
            if let Some(to) = answer.headers.get(LOCATION) {
                let to = to.to_str().expect("an address").to_owned();
                if !to.starts_with('/') && !to.starts_with(&format!("{}/", self.provider.issuer)) {
                    return to;
                }
                answer = self.ask("GET", &to, None).await;
                continue;
            }
            let page = String::from_utf8_lossy(&answer.body).into_owned();
            let Some((action, fields)) = form(&page, person) else { return page };
            let fields: Vec<(&str, &str)> =
                fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            answer = self.ask("POST", &action, Some(&fields)).await;
        }
        panic!("the provider goes in circles");
    }
}

/// The form of a page, filled in; none: it has none.
fn form(page: &str, person: &str) -> Option<(String, Vec<(String, String)>)> {
    let form = page.split("<form").nth(1)?.split("</form>").next()?;
    let attribute = |text: &str, name: &str| {
        Some(text.split(&format!("{name}=\"")).nth(1)?.split('"').next()?.replace("&amp;", "&"))
    };
    let action = attribute(form, "action")?;
    let mut fields = Vec::new();
    for input in form.split("<input").skip(1) {
        let Some(name) = attribute(input, "name") else { continue };
        let value = match name.as_str() {
            "login" => person.to_owned(),
            "password" => "whatever".to_owned(),
            _ => attribute(input, "value").unwrap_or_default(),
        };
        fields.push((name, value));
    }
    Some((action, fields))
}

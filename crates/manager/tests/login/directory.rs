//! OpenLDAP's own server, with a directory of a few people.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::support::{Authority, UP_WITHIN, free_port};

const PEOPLE: &str = include_str!("people.ldif");
/// The password of the account that searches.
pub const ADMIN_PASSWORD: &str = "the password of who searches";

/// A directory that runs until it is dropped.
pub struct Slapd {
    pub authority: Authority,
    pub ldap_port: u16,
    pub ldaps_port: u16,
    child: Child,
}

impl Drop for Slapd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Slapd {
    pub fn start() -> Self {
        let authority = Authority::new();
        let at = |name: &str| authority.path(name).display().to_string();
        // A copy, because AppArmor's profile (Ubuntu) keeps the one that is installed to its own directories.
        fs::copy(installed(), authority.path("slapd")).expect("scripts/deps.sh installs slapd");
        fs::create_dir(authority.path("db")).expect("made");
        let schemas: String = ["core", "cosine", "inetorgperson", "nis"]
            .map(|name| format!("include /etc/ldap/schema/{name}.schema\n"))
            .concat();
        let conf = format!(
            "{schemas}modulepath /usr/lib/ldap\nmoduleload back_mdb\n\
             TLSCACertificateFile {}\nTLSCertificateFile {}\nTLSCertificateKeyFile {}\n\
             security simple_bind=128\npidfile {}\n\
             database mdb\nmaxsize 10485760\nsuffix dc=example,dc=org\nrootdn cn=admin,dc=example,dc=org\n\
             rootpw \"{ADMIN_PASSWORD}\"\ndirectory {}\n",
            at("ca.pem"),
            at("server.pem"),
            at("server.key"),
            at("pid"),
            at("db"),
        );
        authority.write("slapd.conf", &conf);
        authority.write("people.ldif", PEOPLE);
        let added = Command::new(authority.path("slapd"))
            .args(["-T", "add", "-f", &at("slapd.conf"), "-l", &at("people.ldif")])
            .output()
            .expect("slapd runs");
        assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
        authority.write("bind.secret", ADMIN_PASSWORD);
        // Whoever takes a port in between makes slapd end: then another.
        for _ in 0..10 {
            let (ldap_port, ldaps_port) = (free_port(), free_port());
            let mut child = spawn(&authority, ldap_port, ldaps_port);
            if is_up(&mut child, [ldap_port, ldaps_port]) {
                return Self { authority, ldap_port, ldaps_port, child };
            }
        }
        panic!("slapd found no port");
    }

    /// The table of `login.toml` for it; `more` stands at its end.
    pub fn table(&self, url: &str, more: &str) -> String {
        format!(
            "[[ldap]]\nname = \"office\"\nurl = \"{url}\"\nbind_dn = \"cn=admin,dc=example,dc=org\"\n\
             bind_password_file = \"{}\"\nca_file = \"{}\"\nuser_base = \"dc=example,dc=org\"\n\
             group_base = \"ou=groups,dc=example,dc=org\"\n{more}\n",
            self.authority.path("bind.secret").display(),
            self.authority.path("ca.pem").display(),
        )
    }
}

fn spawn(authority: &Authority, ldap_port: u16, ldaps_port: u16) -> Child {
    Command::new(authority.path("slapd"))
        .arg("-f")
        .arg(authority.path("slapd.conf"))
        .args(["-d", "0", "-h"])
        .arg(format!("ldap://127.0.0.1:{ldap_port}/ ldaps://127.0.0.1:{ldaps_port}/"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("slapd runs")
}

fn installed() -> &'static str {
    ["/usr/sbin/slapd", "/usr/libexec/slapd", "/usr/lib/openldap/slapd"]
        .into_iter()
        .find(|path| fs::exists(path).unwrap_or(false))
        .expect("scripts/deps.sh installs slapd")
}

/// Waits until it answers; false: it has ended.
fn is_up(child: &mut Child, ports: [u16; 2]) -> bool {
    let deadline = Instant::now() + UP_WITHIN;
    while Instant::now() < deadline {
        if child.try_wait().expect("its state").is_some() {
            return false;
        }
        if ports.iter().all(|port| std::net::TcpStream::connect(("127.0.0.1", *port)).is_ok()) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    panic!("slapd did not come up within {} s", UP_WITHIN.as_secs());
}

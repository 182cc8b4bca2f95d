//! Joining, renewing, and renewals that are cut short.

use super::*;
use berth_api::pki::Authority;

const NOW: i64 = 1_795_352_752;

fn authority() -> Authority {
    Authority::load(&Authority::create(NOW).expect("CA")).expect("own CA")
}

fn issued(authority: &Authority, number: u8) -> HostIdentity {
    let (key_pem, csr) = pki::signing_request().expect("request");
    let host = HostId::from_entropy([number; 10]);
    let certificate_pem = authority.sign_host(&csr, &host, NOW).expect("signed");
    let identity = Identity { certificate_pem, key_pem };
    HostIdentity { host, identity, ca_pem: authority.certificate_pem().to_owned() }
}

fn files() -> (tempfile::TempDir, IdentityFiles) {
    let directory = tempfile::tempdir().expect("directory");
    let files = IdentityFiles::new(directory.path().join("identity"));
    (directory, files)
}

#[test]
fn an_identity_reads_back_and_its_key_is_for_nobody_else() {
    use std::os::unix::fs::PermissionsExt;
    let (_directory, files) = files();
    assert!(matches!(files.load(), Err(IdentityError::NotJoined { .. })));
    let issued = issued(&authority(), 1);
    files.store(&issued).expect("stored");
    let loaded = files.load().expect("loaded");
    assert_eq!(loaded.host, issued.host);
    assert_eq!(loaded.identity.key_pem, issued.identity.key_pem);
    let mode = std::fs::metadata(files.key()).expect("key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(!files.next_key().exists());
}

#[test]
fn a_renewal_that_is_cut_short_leaves_an_identity_that_works() {
    let authority = authority();
    let (_directory, files) = files();
    let (old, new) = (issued(&authority, 1), issued(&authority, 1));
    files.store(&old).expect("stored");
    std::fs::write(files.next_key(), &new.identity.key_pem).expect("new key");
    assert_eq!(files.load().expect("old").identity.key_pem, old.identity.key_pem);
    std::fs::write(files.certificate(), &new.identity.certificate_pem).expect("new certificate");
    assert_eq!(files.load().expect("new").identity.key_pem, new.identity.key_pem);
}

#[test]
fn keys_that_do_not_fit_are_refused() {
    let authority = authority();
    let (_directory, files) = files();
    let (one, other) = (issued(&authority, 1), issued(&authority, 1));
    files.store(&one).expect("stored");
    std::fs::write(files.key(), &other.identity.key_pem).expect("other key");
    assert!(matches!(files.load(), Err(IdentityError::Tls(_))));
}

#[test]
fn an_answer_for_another_key_or_another_host_is_refused() {
    let authority = authority();
    let (one, other) = (issued(&authority, 1), issued(&authority, 2));
    let reply = |host: &HostIdentity, as_host: &HostIdentity| EnrolReply {
        host: as_host.host.clone(),
        certificate_pem: host.identity.certificate_pem.clone(),
        ca_pem: host.ca_pem.clone(),
    };
    assert!(received(one.identity.key_pem.clone(), reply(&one, &one)).is_ok());
    assert!(received(one.identity.key_pem.clone(), reply(&other, &other)).is_err());
    assert!(received(one.identity.key_pem.clone(), reply(&one, &other)).is_err());
}

#[tokio::test]
async fn a_token_that_is_none_is_refused_before_anybody_is_asked() {
    let (directory, _) = files();
    let enrolment = Enrolment {
        manager: "127.0.0.1:1".into(),
        token: "berth-join-xyz".into(),
        name: "h1".parse().expect("name"),
        address: "127.0.0.1:2".into(),
        state_dir: directory.path().to_owned(),
    };
    assert!(matches!(enrol(&enrolment).await, Err(IdentityError::Token(_))));
}

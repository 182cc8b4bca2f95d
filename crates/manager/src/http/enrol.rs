//! Machines that become hosts, and hosts that renew their certificate.

use std::net::IpAddr;

use berth_api::manager::{CertificateRenew, EnrolReply, EnrolRequest, HostEnrol};
use berth_api::pki::PkiError;
use berth_model::host::{Host, HostState};
use berth_model::{HostId, Problem, ProblemCode};

use crate::auth::accounts::{JoinTokenRow, JoinUse};
use crate::auth::{Principal, SecretHash};
use crate::cluster::Cluster;
use crate::door::target::{Joining, TheHostItself};
use crate::door::{Answer, Call, Door};
use crate::records::{Record, RecordsError, Transaction, UniqueName};

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(enrol).mount(renew)
}

/// The token is used up, the host recorded and its name taken in one transaction. The certificate is made before it
/// and given out after it, so a half-done enrolment has nothing.
async fn enrol(call: Call<HostEnrol, Joining>) -> Result<Answer<EnrolReply>, Problem> {
    let (cluster, wish) = (call.ctx.cluster(), call.input.body);
    let Principal::JoinToken(token_id) = &call.ctx.principal else { return Err(used_up()) };
    check_address(&wish.address)?;
    let token = cluster.records.get::<JoinTokenRow>(token_id).ok_or_else(used_up)?;
    let request = SecretHash::of(wish.csr_pem.as_bytes());
    if let Some(used) = &token.used {
        return again(cluster, used, &request, &wish);
    }
    let host = Host {
        id: HostId::from_entropy(cluster.entropy.id()),
        name: wish.name.clone(),
        address: wish.address.clone(),
        state: HostState::Offline,
        inventory: None,
        last_seen_at: None,
        offline_reason: Some("it has joined and has not reported yet".to_owned()),
        joined_at: call.ctx.now(),
    };
    let reply = certify(cluster, &host.id, &wish.csr_pem)?;
    let mut transaction = Transaction::new();
    let used = Some(JoinUse { host: host.id.clone(), request });
    transaction.replace(&token, &JoinTokenRow { used, ..token.value.clone() });
    transaction.create(&host);
    transaction.claim(&UniqueName::in_cluster(Host::NOUN, &host.name), host.id.as_str());
    match cluster.records.commit(transaction).await {
        Ok(_) => Ok(Answer::new(reply)),
        // Two machines with one token at the same moment: the other was first.
        Err(RecordsError::Conflict { .. }) => Err(used_up()),
        Err(error) => Err(error.into()),
    }
}

/// The machine whose answer was lost asks again, with the same request; anybody else gets nothing.
fn again(
    cluster: &Cluster,
    used: &JoinUse,
    request: &SecretHash,
    wish: &EnrolRequest,
) -> Result<Answer<EnrolReply>, Problem> {
    let host = cluster.records.get::<Host>(used.host.as_str()).filter(|_| used.request == *request);
    match host {
        Some(host) if host.name == wish.name && host.address == wish.address => {
            Ok(Answer::new(certify(cluster, &host.value.id, &wish.csr_pem)?))
        }
        _ => Err(used_up()),
    }
}

async fn renew(call: Call<CertificateRenew, TheHostItself>) -> Result<Answer<EnrolReply>, Problem> {
    let TheHostItself(host) = call.target;
    Ok(Answer::new(certify(call.ctx.cluster(), &host.value.id, &call.input.body.csr_pem)?))
}

fn certify(cluster: &Cluster, host: &HostId, csr_pem: &str) -> Result<EnrolReply, Problem> {
    let now_unix_s = i64::try_from(cluster.clock.now().as_millis() / 1000).unwrap_or(i64::MAX);
    let certificate_pem = cluster.authority.sign_host(csr_pem, host, now_unix_s).map_err(|error| {
        let cause = match &error {
            PkiError::Library { source, .. } => format!("{error}: {source}"),
            PkiError::NotACertificate { .. } | PkiError::Time { .. } => error.to_string(),
        };
        Problem::field("csr_pem", cause, "a certificate signing request in PEM")
    })?;
    let ca_pem = cluster.authority.certificate_pem().to_owned();
    Ok(EnrolReply { host: host.clone(), certificate_pem, ca_pem })
}

fn used_up() -> Problem {
    Problem::new(
        ProblemCode::Unauthenticated,
        "the join token was used before: each admits one machine; make another with 'berth host join-token'",
    )
}

/// An address that others can reach: a name or an address, and a port.
fn check_address(address: &str) -> Result<(), Problem> {
    let expected = "an address that the other hosts can reach, and a port, like 192.0.2.7:8444";
    let wrong = || Problem::field("address", address, expected);
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    if port.parse::<u16>().ok().filter(|port| *port > 0).is_none() {
        return Err(wrong());
    }
    if let Some(inner) = host.strip_prefix('[') {
        let inner = inner.strip_suffix(']').ok_or_else(wrong)?;
        let parsed: std::net::Ipv6Addr = inner.parse().map_err(|_| wrong())?;
        return if parsed.is_unspecified() { Err(wrong()) } else { Ok(()) };
    }
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(parsed)) if !parsed.is_unspecified() => Ok(()),
        Ok(_) => Err(wrong()),
        Err(_) if is_host_name(host) => Ok(()),
        Err(_) => Err(wrong()),
    }
}

fn is_host_name(text: &str) -> bool {
    let label = |part: &str| {
        !part.is_empty()
            && part.len() <= 63
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    // All digits and dots is a mistyped address, not a name.
    text.len() <= 253 && text.split('.').all(label) && text.bytes().any(|byte| byte.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_others_can_reach_are_taken() {
        for good in ["192.0.2.7:8444", "[2001:db8::7]:8444", "host-1.example.org:8444", "localhost:1"] {
            assert!(check_address(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ":",
            "192.0.2.7",
            "192.0.2.7:0",
            "192.0.2.7:65536",
            "0.0.0.0:8444",
            "[::]:8444",
            "::1:8444",
            "1.2.3:8444",
            "-a:1",
            "a b:1",
            "host/path:1",
            "[2001:db8::7:8444",
        ] {
            assert_eq!(check_address(bad).expect_err(bad).field.as_deref(), Some("address"), "{bad}");
        }
    }
}

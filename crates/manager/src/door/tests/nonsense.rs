//! Input that is not what it should be.

use axum::body::Body;
use berth_api::pki::Peer;
use http::Request;
use serde_json::json;

use super::support::Fixture;

#[tokio::test]
async fn a_body_that_is_too_large_is_refused() {
    let fixture = Fixture::new().await;
    let note = "x".repeat(2 << 20);
    let got = fixture.admin("POST", "/v1/tokens", json!({"user": "nobody", "note": note})).await;
    assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (413, "too-large"));
}

#[tokio::test]
async fn a_body_that_is_not_json_is_refused() {
    let fixture = Fixture::new().await;
    for bad in
        ["{", "nonsense", "[]", "7", "null", "\"x\"", "{\"name\":\"a\"} trailing", "\u{0}", &"[".repeat(5000)]
    {
        let got = fixture.call("POST", "/v1/segments", Some(&fixture.admin), bad).await;
        assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (400, "invalid-input"), "{bad}");
    }
}

#[tokio::test]
async fn a_wrong_field_is_named_with_its_value_and_what_was_expected() {
    let fixture = Fixture::new().await;
    let vm = |field: &str, value: serde_json::Value| {
        let mut wish = json!({"segment": "default", "name": "new", "image": "debian"});
        wish[field] = value;
        wish
    };
    for (wish, field, value) in [
        (json!({"segment": "default", "name": "new"}), "image", ""),
        (vm("memory_mib", json!(-5)), "memory_mib", "-5"),
        (vm("memory_mib", json!("much")), "memory_mib", "much"),
        (vm("vcpus", json!(1.5)), "vcpus", "1.5"),
        (vm("name", json!("Not A Name")), "name", "Not A Name"),
        (vm("nics", json!([{}, {"mac": 7}])), "nics[1].mac", "7"),
        (vm("protectd", json!(true)), "protectd", "true"),
        (json!({"segment": "default", "nam": "new", "image": "debian"}), "nam", "new"),
        (vm("nics", json!([{"adress": "dhcp"}])), "nics.0.adress", "dhcp"),
        (vm("user_data", json!("hostname: x")), "user_data", "hostname: x"),
        (vm("ready_timeout_s", json!(0)), "ready_timeout_s", "0"),
        (vm("image", json!("windows")), "image", "windows"),
        (vm("segment", json!("nowhere")), "segment", "nowhere"),
        (vm("host", json!("host-9")), "host", "host-9"),
    ] {
        let got = fixture.admin("POST", "/v1/vms", wish).await;
        let json = got.json();
        assert!(got.status.is_client_error(), "{json}");
        assert_eq!((json["field"].as_str(), json["value"].as_str()), (Some(field), Some(value)), "{json}");
        assert!(json["expected"].as_str().is_some_and(|text| !text.is_empty()), "{json}");
    }
}

#[tokio::test]
async fn a_wrong_query_is_named() {
    let fixture = Fixture::new().await;
    for (path, field) in [
        ("/v1/vms?limit=many", "limit"),
        ("/v1/vms?limit=0", "limit"),
        ("/v1/vms?limit=-1", "limit"),
        ("/v1/vms?limt=5", "limt"),
        ("/v1/vms?cursor=%21", "cursor"),
        ("/v1/operations?kind=vm.fly", "kind"),
        ("/v1/operations?active=perhaps", "active"),
        ("/v1/audit?cursor=eA", "cursor"),
        ("/v1/can-i?action=vm.fly", "action"),
        ("/v1/operations/op-nonsense", "operation"),
    ] {
        let got = fixture.get(path).await;
        assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (400, field), "{path}: {}", got.json());
    }
    for path in ["/v1/vms?segment=nowhere", "/v1/vms?host=host-9", "/v1/operations?vm=default/ghost"] {
        assert_eq!(fixture.get(path).await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn unknown_paths_and_wrong_methods_get_problems_too() {
    let fixture = Fixture::new().await;
    for path in ["/", "/v1", "/v2/vms", "/v1/vms/", "/v1/nonsense", "/v1/vms/a/b/c"] {
        let got = fixture.get(path).await;
        assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (404, "not-found"), "{path}");
        assert!(got.headers.contains_key("x-request-id"));
    }
    for (method, path) in
        [("PUT", "/v1/vms"), ("POST", "/healthz"), ("DELETE", "/v1/vms"), ("BREW", "/v1/vms")]
    {
        let got = fixture.admin(method, path, json!(null)).await;
        assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (405, "method"), "{method} {path}");
    }
    let got = fixture.get("/v1/vms/%ff%fe").await;
    assert_eq!(got.status, 400, "not UTF-8: {}", got.json());
}

#[tokio::test]
async fn things_that_are_not_there_are_said_so_to_who_may_know() {
    let fixture = Fixture::new().await;
    for path in [
        "/v1/vms/default%2Fghost",
        "/v1/vms/books",
        "/v1/vms/vm-0000000000000000",
        "/v1/vms/..%2F..%2Fetc",
        "/v1/vms/default%2Fbooks/snapshots/first",
        "/v1/hosts/host-9",
        "/v1/images/windows",
        "/v1/operations/op-0000000000000000",
    ] {
        let got = fixture.get(path).await;
        assert_eq!(
            (got.status.as_u16(), got.problem().0.as_str()),
            (404, "not-found"),
            "{path}: {}",
            got.json()
        );
    }
}

#[tokio::test]
async fn a_console_without_a_websocket_is_refused() {
    let fixture = Fixture::new().await;
    let got = fixture.get("/v1/vms/default%2Fbooks/console").await;
    assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (400, "invalid-input"));
}

#[tokio::test]
async fn a_body_where_none_belongs_is_refused_and_an_empty_object_is_not() {
    let fixture = Fixture::new().await;
    let got = fixture.admin("DELETE", "/v1/segments/default", json!({"force": true})).await;
    assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (400, "invalid-input"), "{}", got.json());
    let got = fixture.admin("DELETE", "/v1/segments/default", json!({})).await;
    assert_eq!(got.problem().0, "protected", "it has a VM");
}

#[tokio::test]
async fn a_body_that_breaks_off_is_an_error_of_the_request() {
    let fixture = Fixture::new().await;
    let broken = futures_util::stream::iter([
        Ok(bytes::Bytes::from_static(b"{\"name\":")),
        Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
    ]);
    let request = Request::builder()
        .method("POST")
        .uri("/v1/segments")
        .header("authorization", format!("Bearer {}", fixture.admin))
        .body(Body::from_stream(broken))
        .expect("a request");
    let got = fixture.send(request, Peer::Anonymous).await;
    assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (400, "invalid-input"));
}

#[tokio::test]
async fn a_vm_that_no_host_could_ever_run_is_refused_and_nothing_is_left() {
    let fixture = Fixture::new().await;
    for (field, value, code) in [
        ("memory_mib", json!(0), "invalid-input"),
        ("memory_mib", json!(1u64 << 40), "invalid-input"),
        ("disk_mib", json!(0), "invalid-input"),
        ("disk_mib", json!(1u64 << 50), "invalid-input"),
        ("data_disks_mib", json!([64, 0]), "invalid-input"),
        ("data_disks_mib", json!([64, 1u64 << 50]), "invalid-input"),
        ("data_disks_mib", json!(vec![64; 9]), "invalid-input"),
        ("vcpus", json!(0), "invalid-input"),
        ("vcpus", json!(1000), "invalid-input"),
        ("pool", json!("attic"), "invalid-input"),
        ("cpu_model", json!("abacus"), "invalid-input"),
        ("machine_type", json!("isapc"), "invalid-input"),
        ("nics", json!([{"mac": "nonsense"}]), "invalid-input"),
        ("name", json!("books"), "already-exists"),
    ] {
        let mut wish = json!({"segment": "default", "name": "new", "image": "debian", "memory_mib": 512});
        wish[field] = value;
        let got = fixture.admin("POST", "/v1/vms", wish).await;
        let json = got.json();
        assert_eq!(got.problem().0, code, "{field}: {json}");
        assert!(json["field"].as_str().is_some_and(|named| named.starts_with(field)), "{field}: {json}");
        assert!(json["expected"].is_string() && json["value"].is_string(), "{field}: {json}");
    }
    assert_eq!(fixture.get("/v1/vms").await.json()["items"].as_array().map(Vec::len), Some(1));
    assert_eq!(fixture.get("/v1/operations").await.json()["items"].as_array().map(Vec::len), Some(0));
}

use berth_api::manager::{CreateVm, VmListQuery};

use super::*;

#[test]
fn the_words_of_a_problem_say_what_was_expected() {
    let body = br#"{"segment":"s","name":"n","image":"i","memory_mib":-1}"#;
    let problem = typed_body::<CreateVm>(body).map(drop).expect_err("negative");
    assert_eq!(problem.message, "memory_mib is '-1': expected a whole number from 0 on");
    let problem = typed_body::<CreateVm>(b"").map(drop).expect_err("nothing");
    assert_eq!(problem.message, "segment is missing");
    let problem = typed_body::<CreateVm>(b"{x}").map(drop).expect_err("no JSON");
    assert!(problem.message.contains("line 1 column 2"), "{}", problem.message);
}

#[test]
fn queries_are_read_field_by_field() {
    let query = typed_query::<VmListQuery>("segment=a%20b&limit=5").expect("a query");
    assert_eq!((query.segment.as_deref(), query.limit), (Some("a b"), Some(5)));
    assert!(typed_query::<VmListQuery>("").expect("nothing").segment.is_none());
    for (bad, field) in [("limit=x", "limit"), ("limits=5", "limits"), ("limit=5&limit=6", "query")] {
        let problem = typed_query::<VmListQuery>(bad).map(drop).expect_err(bad);
        assert_eq!(problem.field.as_deref(), Some(field), "{bad}");
    }
}

#[test]
fn no_body_and_an_empty_object_are_nothing() {
    for nothing in ["", "{}", "null"] {
        assert!(typed_body::<()>(nothing.as_bytes()).is_ok(), "{nothing}");
    }
    assert!(typed_body::<()>(b"{\"x\":1}").is_err());
}

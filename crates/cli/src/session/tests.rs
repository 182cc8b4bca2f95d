use super::*;
use crate::fake::Fake;
use crate::output::Format;
use berth_api::manager::{CanIReply, PageQuery, Segment, SegmentList};
use berth_model::{SegmentId, Timestamp};

const ROUTE: &str = "GET /v1/segments";

fn page(names: &[&str], next_cursor: Option<&str>) -> Page<Segment> {
    let segment = |name: &&str| Segment {
        parent: None,
        quota: berth_api::manager::Quota::default(),
        id: SegmentId::from_entropy([1; 10]),
        name: name.parse().expect("a name"),
        created_at: Timestamp::default(),
    };
    Page { items: names.iter().map(segment).collect(), next_cursor: next_cursor.map(str::to_owned) }
}

async fn names(fake: &Fake, limit: Option<u32>) -> Result<Vec<String>, Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    let segments = fake.session().pages::<SegmentList, _>(&Nothing {}, limit, query).await?;
    Ok(segments.into_iter().map(|segment| segment.name.to_string()).collect())
}

#[tokio::test]
async fn a_list_is_read_page_by_page() {
    let fake = Fake::new().answer(ROUTE, &page(&["a", "b"], Some("2"))).answer(ROUTE, &page(&["c"], None));
    assert_eq!(names(&fake, None).await.expect("read"), ["a", "b", "c"]);
    let lines: Vec<String> = fake.asked().into_iter().map(|asked| asked.line).collect();
    assert_eq!(lines, [ROUTE, "GET /v1/segments?cursor=2"]);
}

#[tokio::test]
async fn no_more_is_read_than_was_asked_for() {
    let fake = Fake::new().answer(ROUTE, &page(&["a", "b", "c"], Some("3")));
    assert_eq!(names(&fake, Some(2)).await.expect("read"), ["a", "b"]);
    assert_eq!(fake.asked()[0].line, "GET /v1/segments?limit=2");
}

#[tokio::test]
async fn a_manager_whose_pages_do_not_end_is_not_read_for_ever() {
    for endless in [page(&["a"], Some("1")), page(&[], Some("1"))] {
        let fake = Fake::new().answer(ROUTE, &endless);
        let failure = names(&fake, None).await.expect_err("refused");
        assert_eq!(failure.problem().expect("a problem").code, ProblemCode::Internal);
    }
}

#[tokio::test]
async fn a_trial_of_what_is_not_allowed_is_refused() {
    let denied = CanIReply { allowed: false, reason: "no policy permits it".to_owned() };
    let fake = Fake::new().answer("GET /v1/can-i", &denied);
    let tried = fake.session().would(Action::SegmentCreate, None, "would make segment a").await;
    assert_eq!(tried.expect_err("refused").code(), 3);
    assert_eq!(fake.said(), "");

    let fake = Fake::new().answer("GET /v1/can-i", &CanIReply { allowed: true, ..denied });
    let session = fake.session_in(Format::Yaml);
    session.would(Action::SegmentDelete, Some("a"), "would delete segment a").await.expect("allowed");
    assert_eq!(fake.said(), "dry_run: true\nsummary: would delete segment a\n");
    assert_eq!(fake.asked()[0].line, "GET /v1/can-i?action=segment.delete&resource=a");
}

#[tokio::test]
async fn an_answer_that_is_not_of_the_contract_is_a_fault_and_not_a_crash() {
    let fake = Fake::new().answer(ROUTE, &serde_json::json!({"items": 7}));
    assert_eq!(names(&fake, None).await.expect_err("nonsense").code(), 1);
}

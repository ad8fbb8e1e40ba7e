//! What is PostgreSQL's alone.

use serde_json::json;
use turnhouse_tests::database::Backing;
use turnhouse_tests::program::{command, run, run_with};
use turnhouse_tests::{Home, Program, Tables};

use super::*;

#[test]
fn o1_one_role_migrates_and_another_that_owns_nothing_serves() {
    let home = Home::on(Backing::Shared);
    let database = home.database().expect("a database");
    let (owner, host) = (database.direct_url(), database.url());
    Tables::of(database).to_damage().execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public");
    let data_dir = home.path().join("data");
    let as_host = |arguments: &[&str]| {
        let place = ["--data-dir", text(&data_dir), "--database-url", host.as_str()];
        run(&[arguments, &place].concat())
    };
    failed(&as_host(&["status"]), 1, &["may not do that", "turnhouse migrate"]);
    let migrate = || run(&["migrate", "--json", "--data-dir", text(&data_dir), "--database-url", &owner]);
    let migrated = migrate().json();
    assert_eq!((&migrated["store"], migrate().json()), (&json!("postgres"), migrated.clone()), "again is no harm");
    assert_eq!(as_host(&["migrate"]).code, 0, "there is nothing left to do");

    assert_eq!(as_host(&["orgs", "create", "acme"]).code, 0);
    let key = as_host(&["keys", "create", "--json", "--org", "acme", "--user", "ann", "--scopes", "admin"]).json();
    let key = key["api_key"].as_str().expect("a key").to_owned();
    let mut serving = Program::serve(&data_dir, "127.0.0.1:0", &[("TURNHOUSE_DATABASE_URL", host.as_str())]);
    let url = serving.ready().expect("it is ready")["url"].as_str().expect("a url").to_owned();
    let over = ["--url", &url, "--api-key", &key];
    let client = |arguments: &[&str]| run(&[arguments, &over].concat());
    assert_eq!(client(&["deploy", &guest("snapshot_counter")]).code, 0);
    for turn in ["1", "2"] {
        let chat = [&["chat", "snapshot_counter", "--conversation", "c"][..], &over].concat();
        let said = run_with(&mut command(&chat), b"hi\n");
        assert!(said.code == 0 && said.stdout.contains(turn), "{said:?}");
    }
    let found = as_host(&["doctor", "--json"]).json();
    let wall = found["findings"].as_array().expect("a list").iter().find(|finding| finding["what"] == "wall");
    let wall = wall.expect("a finding");
    assert!(wall["health"] == "good" && wall["text"].to_string().contains("does not own the tables"), "{wall}");
    assert!(serving.terminate().success());
}

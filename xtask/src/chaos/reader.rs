//! How an accepted turn is read: to its end, over as many connections and replicas as that takes; and once more when all is over.

use std::rc::Rc;
use std::time::Duration;

use super::desk::{Asked, Desk, Left};
use super::dice::Dice;
use super::record::{End, Read};

/// Before the same is asked once more.
pub const PAUSE: Duration = Duration::from_millis(120);

/// Follows an accepted turn to its end, on one replica after another.
pub async fn follow(desk: &Desk, dice: &mut Dice, place: usize) {
    loop {
        let (id, org, cursor, deleted) = {
            let record = desk.record.borrow();
            let turn = &record.turns[place];
            if turn.is_over() {
                break;
            }
            let id = turn.id.clone().expect("only what was accepted is followed");
            (id, desk.org(&turn.lane).clone(), turn.cursor(), turn.deleted_at.is_some())
        };
        match desk.events(dice, &org, &id, cursor).await {
            Asked::Stream(opened) => {
                let patience = Duration::from_millis(dice.between(400, 4_000));
                let enough = if dice.percent(45) { dice.between(1, 12) as usize } else { usize::MAX };
                if desk.read(place, opened, cursor, patience, enough).await == Left::Broke {
                    tokio::time::sleep(Duration::from_millis(dice.below(100))).await;
                }
            }
            Asked::Answer(answer) if answer.status == 404 => {
                let mut record = desk.record.borrow_mut();
                let now = record.now();
                record.turns[place].gone_at = Some(now);
                if !deleted {
                    let what = format!("turn {id} was accepted, and replica {} does not know it", answer.replica);
                    record.violation("T1", what, vec![place]);
                }
            }
            Asked::Answer(answer) if answer.status < 429 => {
                let what = format!("reading on after {cursor:?} is answered with {}: {}", answer.status, answer.body);
                desk.record.borrow_mut().violation("E2", what, vec![place]);
                tokio::time::sleep(PAUSE).await;
            }
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
    // Judged as soon as it can be: whoever looks on learns of a violation when it happens.
    let mut record = desk.record.borrow_mut();
    let wrong = super::rules::of_turn(&record.turns[place]);
    for (rule, what) in wrong {
        record.violation(rule, what, vec![place]);
    }
}

/// Reads turns that have ended once more: each one's resource, and of every fourth its stream from the start.
pub async fn look_again(desk: Rc<Desk>, mut dice: Dice, places: Vec<usize>) {
    for place in places {
        let (id, org) = {
            let record = desk.record.borrow();
            let turn = &record.turns[place];
            (turn.id.clone().expect("only accepted turns are read"), desk.org(&turn.lane).clone())
        };
        for _ in 0..20 {
            match desk.ask(&mut dice, &org, ("GET", &format!("/v1/turns/{id}")), &[], "").await {
                Some(answer) if answer.status == 200 => {
                    let mut record = desk.record.borrow_mut();
                    let at = record.now();
                    record.turns[place].reads.push(Read {
                        at,
                        replica: answer.replica,
                        end: End::of_turn(&answer.body),
                    });
                    break;
                }
                Some(answer) if answer.status == 404 => {
                    let what =
                        format!("turn {id} was accepted, and at the end replica {} does not know it", answer.replica);
                    desk.record.borrow_mut().violation("T1", what, vec![place]);
                    break;
                }
                _ => tokio::time::sleep(PAUSE).await,
            }
        }
        if dice.percent(25)
            && let Asked::Stream(opened) = desk.events(&mut dice, &org, &id, None).await
        {
            desk.read(place, opened, None, Duration::from_secs(5), usize::MAX).await;
        }
    }
}

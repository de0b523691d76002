//! Tests of server.rs, part by part: what no transcript can show, a model that the outbox is checked
//! against, and the calls of the real operating system. They are part of the server's own module, so
//! that they see all of it.

use super::*;
use os::chance::Chance;
use os::{Buffers, Conditions, Peer};
use std::net::{TcpListener, TcpStream};
#[cfg(target_os = "linux")]
use std::process::{Command as Process, Stdio};

fn pick<T: Copy>(chance: &mut Chance, from: &[T]) -> T {
    from[chance.below(from.len())]
}

// 1. The wire

/// All that a decoder finds in `pieces`, as text.
fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
    let mut decoder = Decoder::default();
    let mut found = Vec::new();
    for mut input in pieces {
        while let Some(decoded) = decoder.next(&mut input) {
            found.push(match decoded {
                Decoded::Line(line) => line.escape_ascii().to_string(),
                Decoded::TooLong => "too long".to_owned(),
                Decoded::TelnetAnswer(answer) => format!("{answer:?}"),
            });
        }
        assert!(input.is_empty());
    }
    found
}

#[test]
fn lines_do_not_depend_on_how_the_stream_is_cut() {
    let stream = [
        b"MSG a\r\n\nMSG \xff\xfd\n b\x08c\xff\xfa\x01\n\xf0x\xff\xff\xf0x\xff\xf0\r\0".as_slice(),
        b"d\xff\xff\r\xff\xf1\n\0\n\xc3\xa9\x7fy\xff\xff\x7f\xff\xfbA\xff\xfcB\xff\xfeCe\r\r\n",
    ]
    .concat();
    let whole = ["MSG a", "[255, 252, 10]", "MSG  c", "d\\xff", "\\x00", "[255, 254, 65]", "ye\\r"];
    assert_eq!(decode([&*stream]), whole);
    for cut in 0..=stream.len() {
        assert_eq!(decode([&stream[..cut], &stream[cut..]]), whole, "cut at {cut}");
    }
    let mut chance = Chance(1);
    let special = b"\xff\xff\xfa\xf0\xfb\xfc\xfd\xfe\x08\x7f\r\n\0ab\xc3\xa9";
    for _ in 0..5_000 {
        let mut stream = Vec::new();
        for _ in 0..1 + chance.below(4) {
            stream.extend((0..chance.below(20)).map(|_| pick(&mut chance, special)));
            let long = pick(&mut chance, &[0, 0, 3, MAX_REQUEST - 5, MAX_REQUEST]);
            stream.extend(std::iter::repeat_n(b'x', long));
        }
        let size = 1 + pick(&mut chance, &[0, 2, 10, 1000]);
        let pieces = decode(stream.chunks(size));
        assert_eq!(pieces, decode([&*stream]), "{}", stream.escape_ascii());
    }
}

#[test]
fn a_line_is_too_long_with_byte_4001_of_its_text() {
    let full = [b'x'; MAX_REQUEST];
    let count = |rest: &[u8]| decode([&full, rest]).len();
    let first = |rest: &[u8]| decode([&full, rest]).into_iter().next().unwrap_or_default();
    // The ending, telnet commands and erased characters do not count.
    assert_eq!([count(b""), count(b"\r"), count(b"\r\n"), count(b"\r\0")], [0, 0, 1, 1]);
    assert_eq!(first(b"\xff\xf1\x08y\r\n").len(), MAX_REQUEST);
    assert_eq!(first(b"\r\xff\xf1\0").len(), MAX_REQUEST);
    assert_eq!(first(b"\r\x08\n").len(), MAX_REQUEST);
    for rest in [b"y".as_slice(), b"\ry", b"\r\r", b"\x08yz"] {
        assert_eq!(first(rest), "too long", "{}", rest.escape_ascii());
    }
    // In the skipped rest telnet is answered, erasing does nothing, and CR NUL ends it.
    let skipped: &[u8] = b"xx\xff\xfd\x06\0\r\x08\x08\0next\n";
    assert_eq!(decode([&full, skipped]), ["too long", "[255, 252, 6]", "next"]);
    assert_eq!(decode([&full[1..], b"\ryz\x08\x08\0\nnext\n"]), ["too long", "next"]);
}

#[test]
fn a_decoder_keeps_no_memory_between_lines() {
    let mut decoder = Decoder::default();
    let mut capacity_after = |mut input: &[u8]| {
        while decoder.next(&mut input).is_some() {}
        decoder.line.capacity()
    };
    assert_eq!(capacity_after(b"MSG a\nMSG b\r\n"), 0);
    assert!(capacity_after(b"MSG ") > 0);
    assert_eq!(capacity_after(b"c\n"), 0);
    // The rest of a long line is held nowhere.
    (0..1000).for_each(|_| assert!(capacity_after(&[b'x'; MAX_REQUEST]) < 4 * MAX_REQUEST));
}

#[test]
fn the_first_check_that_fails_gives_the_error() {
    for (is_named, expected, lines) in [
        (false, "bad-text", "NAME \u{7f}|nonsense \u{202e}"),
        (true, "unknown-command", "MſG hi|msg\thi| MSG hi| |MSGS"),
        (true, "already-named", "NAME ana|NAME|name |NAME a b"),
        (false, "not-named", "MSG hi|MSG|PRIV @bob hi|PRIV bob hi|LIST|list x"),
        (false, "usage", "NAME|name |HELP x|QUIT \t"),
        (true, "usage", "MSG|MSG |PRIV @bob |PRIV @bob|PRIV @ hi|PRIV bob hi|PRIV  @bob hi|LIST x"),
        (false, "", "NAME ana|name a b|PiNg|PING  a b|help  |QUIT"),
        (true, "", "MSG  |PRIV @bob  |LIST  |PING|HELP|quit "),
    ] {
        for line in lines.split('|') {
            let code = parse(line.as_bytes(), is_named).err().map_or("", |Refusal(code, _)| code);
            assert_eq!(code, expected, "{line:?}");
        }
    }
    assert_eq!(parse(b"MSG \xff", false), Err(BAD_TEXT));
    let text = "  é\t🙂 ";
    assert_eq!(parse("MSG   é\t🙂 ".as_bytes(), true), Ok(Request::Msg(text)));
    let to = "bob";
    assert_eq!(parse("PRIV @bob   é\t🙂 ".as_bytes(), true), Ok(Request::Priv { to, text }));
    assert_eq!(parse("PING   é\t🙂 ".as_bytes(), true), Ok(Request::Ping(text)));
}

#[test]
fn texts_hold_no_control_character_and_none_that_turns_the_direction() {
    for character in '\0'..=char::MAX {
        // As PROTOCOL.md lists them under "Text".
        let is_listed = match u32::from(character) {
            0x09 => false,
            0..=0x1f | 0x7f..=0x9f | 0x2028..=0x202e | 0x2066..=0x2069 => true,
            _ => false,
        };
        assert_eq!(is_forbidden_in_text(character), is_listed, "{}", character.escape_unicode());
    }
}

#[test]
fn names_hold_what_the_document_allows() {
    for good in ["a", "7", "a_b-c.", "Jose\u{301}", "\u{301}", "李雷", "🙂", "‰", "½", "हिन्दी"]
    {
        assert!(is_good_name(good), "{good}");
    }
    assert!(is_good_name(&"é".repeat(25)) && !is_good_name(&"é".repeat(26)));
    for bad in ["", "_", "-a", ".", "a b", "a@b", "é b", "a\t", "a\u{200b}", "\u{3164}"] {
        assert!(!is_good_name(bad), "{bad}");
    }
    let ascii: String = (' '..='~').filter(|c| is_good_name(&format!("é{c}"))).collect();
    assert_eq!(ascii, "-.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz");
    // The list of the document: hexadecimal numbers and ranges up to "and".
    let names = include_str!("../../PROTOCOL.md").split("\n## Names\n").nth(1).unwrap();
    let list =
        names.lines().filter_map(|line| line.strip_prefix("    ")).flat_map(str::split_whitespace);
    let ranges: Vec<_> = list
        .take_while(|word| *word != "and")
        .map(|word| {
            let (first, last) = word.trim_end_matches(',').split_once('–').unwrap_or((word, word));
            [first, last].map(|hex| u32::from_str_radix(hex, 16).unwrap())
        })
        .collect();
    for character in '\u{80}'..=char::MAX {
        let code = u32::from(character);
        let is_listed = ranges.iter().any(|&[first, last]| (first..=last).contains(&code));
        let is_last_of_plane = [0xfffe, 0xffff].contains(&(code & 0xffff));
        let is_good = is_good_name(character.encode_utf8(&mut [0; 4]));
        assert_eq!(is_good, !is_listed && !is_last_of_plane, "{code:X}");
    }
}

#[test]
fn a_roster_line_is_filled_to_its_last_byte() {
    // "USERS 9", a space before each name, and CR LF.
    let long = "x".repeat(MAX_LINE - "USERS 9 \r\n".len() - " y".len());
    for (names, lines) in [(vec![&*long, "y"], 1), (vec![&*long, "yy"], 2), (vec!["y", &*long], 1)]
    {
        let mut bytes = b"before\r\n".to_vec();
        put_roster(&mut bytes, 9, names.iter().copied());
        let text = String::from_utf8(bytes).unwrap();
        let text = text.strip_prefix("before\r\n").unwrap();
        assert_eq!(text.split_terminator("\r\n").count(), lines);
        assert!(text.split_inclusive("\r\n").all(|line| line.len() <= MAX_LINE));
        let words = text.split_whitespace().filter(|word| !["USERS", "9"].contains(word));
        assert_eq!(words.collect::<Vec<_>>(), names);
    }
}

// 2. Output

#[test]
fn positions_in_the_log_keep_their_meaning_and_each_byte_is_moved_once_on_average() {
    let mut chance = Chance(2);
    let (mut log, mut all, mut moved, mut cursor) = (Log::default(), Vec::new(), 0, 0);
    for _ in 0..5_000 {
        let length = pick(&mut chance, &[0, 1, 10, 300, 3000]);
        let lines: Vec<u8> = (0..length).map(|_| chance.below(256) as u8).collect();
        log.bytes.extend(&lines);
        all.extend(lines);
        // A cursor that now and then catches up.
        cursor += match chance.below(50) {
            0 => all.len() - cursor,
            _ => chance.below(all.len() - cursor + 1).min(1000),
        };
        let start = log.start;
        log.trim(cursor as u64);
        moved += if log.start > start { log.bytes.len() } else { 0 };
        assert_eq!(log.end(), all.len() as u64);
        assert!(log.slice(cursor as u64, log.end()) == &all[cursor..]);
        assert!(log.bytes.len() <= 2 * (all.len() - cursor), "what is dead outweighs what is not");
    }
    assert!(moved > 0 && moved <= all.len(), "{moved} bytes moved of {}", all.len());
    log.trim(log.end());
    log.bytes.extend(vec![0; 10 * Log::KEPT_CAPACITY]);
    log.trim(log.end());
    assert!(log.bytes.capacity() <= Log::KEPT_CAPACITY);
}

/// Where a byte in a client's pending output comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    Log,
    /// In the log, but said by the client itself.
    Skipped,
    Private,
    Reply,
}

/// An outbox, and byte by byte what it must hold.
#[derive(Default)]
struct Checked {
    outbox: Outbox,
    expected: VecDeque<(u8, Source)>,
    /// Where the log ended for this client; `None` while it is in the room.
    left_at: Option<u64>,
}

impl Checked {
    fn add(&mut self, bytes: &[u8], source: Source) {
        self.expected.extend(bytes.iter().map(|&byte| (byte, source)));
        // A client's own messages hold the log only if another line of the log stands before them.
        let logged = self.expected.iter().position(|(_, source)| *source == Source::Log);
        let before = logged.unwrap_or(self.expected.len());
        if self.expected.range(..before).any(|(_, source)| *source == Source::Skipped) {
            let rest = self.expected.split_off(before);
            self.expected.retain(|(_, source)| *source != Source::Skipped);
            self.expected.extend(rest);
        }
    }

    /// The socket takes up to `most` bytes. Returns how many.
    fn take(&mut self, log: &Log, most: usize) -> usize {
        let mut scratch = Vec::new();
        let chunk = self.outbox.next_chunk(log, &mut scratch);
        let sent = self.expected.iter().filter(|(_, source)| *source != Source::Skipped);
        assert!(sent.clone().take(chunk.len()).map(|(byte, _)| byte).eq(chunk));
        let is_all_own = self.outbox.cursor(log).is_none();
        let is_part = chunk.len() == Outbox::CHUNK || (is_all_own && !chunk.is_empty());
        assert!(is_part || chunk.len() == sent.count(), "{}", chunk.len());
        assert!(chunk.len() <= Outbox::CHUNK || is_all_own || self.outbox.inserts.is_empty());
        let taken = chunk.len().min(most);
        let (mut rest, mut own) = (taken, 0);
        while rest > 0 {
            let (_, source) = self.expected.pop_front().unwrap();
            rest -= usize::from(source != Source::Skipped);
            own += usize::from(matches!(source, Source::Private | Source::Reply));
        }
        self.add(&[], Source::Skipped);
        assert_eq!(self.outbox.consume(taken), own);
        taken
    }

    fn check(&self, log: &Log) {
        let count = |sources: &[Source]| {
            self.expected.iter().filter(|(_, source)| sources.contains(source)).count()
        };
        assert_eq!(self.outbox.pending(log), self.expected.len());
        assert_eq!(self.outbox.own_bytes, count(&[Source::Private, Source::Reply]));
        let last_reply = self.expected.iter().rposition(|(_, source)| *source == Source::Reply);
        let until_reply = self.expected.iter().take(last_reply.map_or(0, |at| at + 1));
        let is_own = |(_, source): &&_| matches!(source, Source::Private | Source::Reply);
        assert_eq!(self.outbox.until_reply, until_reply.filter(is_own).count());
        let logged = count(&[Source::Log, Source::Skipped]) as u64;
        let end = self.left_at.unwrap_or(log.end());
        assert_eq!(self.outbox.cursor(log), (logged > 0).then(|| end - logged));
    }
}

#[test]
fn an_outbox_gives_out_each_byte_once_and_in_order() {
    let mut chance = Chance(3);
    let mut log = Log::default();
    let mut clients: [Checked; 4] =
        std::array::from_fn(|_| Checked { left_at: Some(0), ..Checked::default() });
    for step in 0..10_000 {
        let id = chance.below(clients.len());
        let length = pick(&mut chance, &[1, 2, 5, 20, 20, 100, 100, 300]);
        let length = if step % 500 < 10 { 300 * length } else { length };
        let line: Vec<u8> = (0..length).map(|_| chance.below(256) as u8).collect();
        let client = &mut clients[id];
        match chance.below(if client.left_at.is_none() { 40 } else { 20 }) {
            0..=2 => {
                client.outbox.push(&line, &log, false);
                client.add(&line, Source::Private);
            }
            3..=4 => {
                client.outbox.push(&line, &log, true);
                client.add(&line, Source::Reply);
            }
            5..=9 => drop(client.take(&log, chance.below(200))),
            10..=12 if step % 500 > 9 => drop(client.take(&log, usize::MAX)),
            13 if client.left_at == Some(0) => {
                client.outbox.start_at_end(&log);
                client.left_at = None;
            }
            14 if client.left_at.is_some() => {
                // Another client gets the slot.
                *client = Checked { left_at: Some(0), ..Checked::default() };
            }
            15 if chance.below(20) == 0 => {
                client.outbox.stop_at_end(&log);
                client.left_at.get_or_insert(log.end());
            }
            _ => {
                log.bytes.extend(&line);
                for (other, client) in clients.iter_mut().enumerate() {
                    if other == id {
                        client.outbox.skip(line.len(), &log);
                    }
                    if client.left_at.is_none() {
                        let source = if other == id { Source::Skipped } else { Source::Log };
                        client.add(&line, source);
                    }
                }
            }
        }
        clients.iter().for_each(|client| client.check(&log));
        if chance.below(4) == 0 {
            let cursors = clients.iter().filter_map(|client| client.outbox.cursor(&log));
            log.trim(cursors.min().unwrap_or(log.end()));
        }
        if step % 100 == 10 {
            for client in &mut clients {
                while client.take(&log, usize::MAX) > 0 {}
                assert!(client.expected.is_empty());
                assert_eq!(client.outbox.inserts.capacity(), 0, "memory is kept");
            }
        }
    }
}

#[test]
fn a_flooder_with_one_unread_byte_needs_few_inserts() {
    let (mut log, mut outbox) = (Log::default(), Outbox::default());
    outbox.start_at_end(&log);
    log.bytes.extend(b"x");
    for _ in 0..1000 {
        log.bytes.extend(b"MSG flooder text\r\n");
        outbox.skip(18, &log);
    }
    assert_eq!(outbox.inserts.len(), 1);
    for _ in 0..1000 {
        outbox.push(b"PONG\r\n", &log, true);
    }
    assert_eq!((outbox.inserts.len(), outbox.consume(1)), (2, 0));
    assert_eq!(outbox.next_chunk(&log, &mut Vec::new()).len(), 6000);
}

#[test]
fn requests_wait_from_the_first_byte_of_replies_above_the_limit() {
    let Room { mut clients, log, .. } = room_with(&["ana"]);
    let client = clients.get_mut(0).unwrap();
    client.outbox.push(&[b'x'; REPLY_LIMIT], &log, true);
    assert!(client.takes_requests());
    // Private messages after the last reply do not count.
    client.outbox.push(&[b'x'; REPLY_LIMIT], &log, false);
    assert!(client.takes_requests());
    client.outbox.push(b"x", &log, true);
    assert!(!client.takes_requests());
    client.outbox.consume(REPLY_LIMIT + 1);
    assert!(client.takes_requests());
}

// 3. The room

/// A room with these members, which have received everything.
fn room_with(names: &[&str]) -> Room {
    let (listener, _signals) = os::begin(1, Conditions::default());
    let mut room = Room::default();
    for (id, name) in names.iter().enumerate() {
        Peer::connect(([192, 0, 2, 7], id as u16).into(), Buffers::UNLIMITED);
        let (socket, address) = listener.accept().unwrap();
        room.clients.insert(Client::new(socket, address));
        room.join(id, name);
    }
    for id in 0..names.len() {
        let Client { outbox, .. } = room.clients.get_mut(id).unwrap();
        *outbox = Outbox::default();
        outbox.start_at_end(&room.log);
    }
    room.work = 0;
    room
}

#[test]
fn a_request_costs_the_line_that_others_receive() {
    let mut room = room_with(&["ana", "Bob"]);
    for (request, cost) in [
        (Request::Msg("hi"), "MSG ana hi\r\n".len()),
        (Request::Priv { to: "bob", text: "hi" }, "PRIV ana hi\r\n".len()),
        (Request::Priv { to: "ANA", text: "hi" }, 0),
        (Request::Priv { to: "eve", text: "hi" }, 0),
        (Request::List, 0),
        (Request::Ping("hi"), 0),
        (Request::Quit, 0),
    ] {
        assert_eq!(room.cost(0, request), cost);
        let before = room.clients.get(1).unwrap().outbox.pending(&room.log);
        let _ = room.carry_out(0, request);
        let after = room.clients.get(1).unwrap().outbox.pending(&room.log);
        assert_eq!(after - before, cost, "{request:?}");
    }
    // JOINED and LEFT in a room of up to 999,999.
    let cost = "JOINED bo 999999\r\nLEFT bo 999999 disconnected\r\n".len();
    assert_eq!(room.cost(2, Request::Name("bo")), cost);
    assert_eq!([room.cost(2, Request::Name("b b")), room.cost(2, Request::Name("bob"))], [0, 0]);
}

#[test]
fn a_line_for_everybody_is_stored_once() {
    let names: Vec<_> = (0..100).map(|id| format!("p{id}")).collect();
    let mut room = room_with(&names.iter().map(|name| &**name).collect::<Vec<_>>());
    let end = room.log.end();
    room.carry_out(7, Request::Msg("to all of you")).unwrap();
    let line = b"MSG p7 to all of you\r\n".as_slice();
    assert_eq!(room.log.slice(end, room.log.end()), line);
    assert_eq!(room.work, (line.len() as u64 + 64) * 64, "work does not grow with the room");
    for (id, client) in room.clients.iter() {
        assert_eq!(client.outbox.inserts.capacity(), 0);
        let expected = if id == 7 { b"".as_slice() } else { line };
        assert_eq!(client.outbox.next_chunk(&room.log, &mut Vec::new()), expected);
    }
}

// 4. Flow control

/// A budget that applies, with an empty bucket and these clients waiting with requests of this cost.
fn budget_with(now: Instant, waiting: &[(Id, u64)]) -> Budget {
    let mut budget = Budget::default();
    budget.over_soft_limit.insert(99);
    budget.update(0, now);
    budget.queue.push(98, BUDGET as u64);
    assert_eq!(budget.next(now), Some(98));
    waiting.iter().for_each(|&(id, cost)| budget.queue.push(id, cost));
    budget
}

/// The clients whose requests go on at `now`, in order.
fn batch(budget: &mut Budget, now: Instant) -> Vec<Id> {
    std::iter::from_fn(|| budget.next(now)).collect()
}

#[test]
fn the_budget_applies_while_a_client_is_behind_or_own_lines_fill_64_mib() {
    let now = os::now();
    let mut budget = Budget::default();
    let mut applies = |own_bytes, is_behind| {
        budget.over_soft_limit = BTreeSet::from_iter(Some(7).filter(|_| is_behind));
        budget.update(own_bytes, now);
        budget.applies()
    };
    assert!(!applies(0, false) && applies(0, true) && !applies(0, false));
    assert!(!applies(OWN_BYTES_LIMIT, false) && applies(OWN_BYTES_LIMIT + 1, false));
    // It keeps the time when it began.
    let mut budget = budget_with(now, &[]);
    budget.update(0, now + Duration::from_secs(5));
    assert_eq!(budget.applies_since, Some(now));
    budget.over_soft_limit.clear();
    budget.update(0, now);
    assert_eq!(budget.applies_since, None);
}

#[test]
fn all_waiting_requests_go_on_unpaid_when_the_budget_ceases() {
    let now = os::now();
    let mut budget = budget_with(now, &[(1, 1000), (2, 10 * BUDGET as u64), (3, 1)]);
    assert_eq!(batch(&mut budget, now), []);
    budget.over_soft_limit.clear();
    budget.update(0, now);
    assert_eq!(budget.next_time(now), Some(now));
    let paid_until = budget.paid_until;
    assert_eq!(batch(&mut budget, now), [3, 1, 2]);
    assert_eq!((budget.next_time(now), budget.paid_until), (None, paid_until));
}

#[test]
fn the_bucket_fills_at_64_kib_a_second_and_holds_a_second_of_it() {
    let start = os::now();
    let half = BUDGET as u64 / 2;
    let mut budget = budget_with(start, &[(1, half)]);
    let at = |milliseconds| start + Duration::from_millis(milliseconds);
    assert_eq!(batch(&mut budget, at(499)), []);
    // Batches are 20 ms apart.
    assert_eq!(budget.next_time(at(499)), Some(at(519)));
    assert_eq!(batch(&mut budget, at(518)), []);
    assert_eq!(batch(&mut budget, at(519)), [1]);
    // What came in during these 19 ms is still there.
    budget.queue.push(1, half + half / 50);
    assert_eq!(batch(&mut budget, at(1000)), []);
    assert_eq!(batch(&mut budget, at(1020)), [1]);
    // Ten seconds later there is one second of it, not ten.
    (1..=3).for_each(|id| budget.queue.push(id, half));
    assert_eq!(batch(&mut budget, at(11_020)), [1, 2]);
    assert_eq!(batch(&mut budget, at(11_519)), []);
    assert_eq!(batch(&mut budget, at(11_539)), [3]);
}

/// Serves the next client of a queue at this cost.
fn serve(queue: &mut FairQueue, cost: u64) -> Id {
    let id = queue.pop().unwrap();
    queue.charge(id, cost);
    id
}

#[test]
fn the_smallest_finish_goes_next_as_in_the_example_of_the_document() {
    let (ana, bob, cleo) = (1, 2, 3);
    let mut queue = FairQueue::default();
    let position = |queue: &FairQueue| queue.virtual_time / FairQueue::SCALE;
    queue.push(ana, 1000);
    queue.push(bob, 600);
    assert_eq!((serve(&mut queue, 600), position(&queue)), (bob, 300));
    queue.push(bob, 600);
    assert_eq!((serve(&mut queue, 1000), position(&queue)), (ana, 800));
    // A new client starts level with those that wait.
    queue.push(cleo, 100);
    let finishes = [bob, cleo].map(|id| queue.finishes[&id] / FairQueue::SCALE);
    assert_eq!(finishes, [1200, 900]);
    assert_eq!([serve(&mut queue, 100), serve(&mut queue, 600)], [cleo, bob]);
    assert_eq!((queue.is_empty(), position(&queue), queue.finishes.len()), (true, 0, 0));
}

#[test]
fn clients_that_send_little_go_first_and_no_client_is_passed_for_ever() {
    let mut queue = FairQueue::default();
    queue.push(1, 1000);
    queue.push(2, 10);
    // A client that waits already keeps its place.
    queue.push(2, 10);
    assert_eq!((queue.waiting.len(), queue.finishes[&2]), (2, 10 * FairQueue::SCALE));
    let mut served = 0;
    while serve(&mut queue, 10) == 2 {
        served += 1;
        queue.push(2, 10);
    }
    assert!((99..=101).contains(&served), "{served} of 10 bytes went before one of 1000");
}

#[test]
fn all_clients_start_level_again_when_none_waits() {
    let mut queue = FairQueue::default();
    queue.push(1, 0);
    queue.push(2, 7);
    assert_eq!(serve(&mut queue, 1000), 1);
    queue.remove(2);
    assert_eq!((queue.virtual_time, queue.finishes.len()), (0, 0));
}

#[test]
fn a_client_that_is_gone_no_longer_waits() {
    let now = os::now();
    let mut budget = budget_with(now, &[(1, 10), (2, 20)]);
    budget.queue.remove(1);
    assert_eq!(batch(&mut budget, now + Duration::from_secs(1)), [2]);
    budget.over_soft_limit.clear();
    budget.update(0, now);
    assert!(!budget.applies());
}

#[test]
fn a_request_pays_its_cost_as_read_though_it_is_refused_later() {
    let (listener, signals) = os::begin(1, Conditions::default());
    // No time passes.
    os::set_alarm(Some(os::time()));
    let Ok(Command::Run(options)) = arguments("") else { panic!("refused") };
    let mut server = Server::new(options, listener, signals, Console::new().0).unwrap();
    server.room.budget.over_soft_limit.insert(99);
    let peers = [1, 2].map(|at| Peer::connect(([192, 0, 2, at], 7).into(), Buffers::UNLIMITED));
    // From its first turn on, the budget applies.
    server.turn().unwrap();
    peers.iter().for_each(|peer| peer.send(b"NAME eve\nPING\n"));
    (0..10).for_each(|_| server.turn().unwrap());
    let mut received = Vec::new();
    for peer in peers {
        peer.take(usize::MAX, &mut received);
    }
    let received = String::from_utf8(received).unwrap();
    for (lines, count) in
        [("WELCOME eve 1\r\nPONG\r\n", 1), ("ERR name-taken ", 1), ("PONG\r\n", 2)]
    {
        assert_eq!(received.matches(lines).count(), count, "{lines}: {received}");
    }
    assert_eq!(server.room.budget.paid_until.unwrap() - server.now, 2 * time_for(2 * 3 + 43));
}

// 6. The console

/// Keeps what is written to it, one entry for each write, and refuses the first.
#[derive(Default)]
struct Printed(Vec<Vec<u8>>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes.to_vec());
        if self.0.len() > 1 {
            Ok(bytes.len())
        } else {
            Err(ErrorKind::StorageFull.into())
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_console_that_is_not_read_drops_lines_and_tells_how_many() {
    let (mut console, texts) = Console::new();
    let shown = || -> Vec<String> {
        let lines = texts.try_iter().collect::<String>();
        lines.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    };
    let long = "x".repeat(1000);
    let mut kept = 0;
    while console.dropped == 0 {
        console.log(format_args!("{kept} {long}"));
        console.flush();
        kept += 1;
    }
    (0..999).for_each(|_| console.log(format_args!("not printed")));
    assert_eq!(shown().len(), kept - 1);
    console.pending.store(Console::MAX_PENDING - 1, Ordering::Relaxed);
    console.log(format_args!("after"));
    console.flush();
    assert_eq!(shown(), ["1000 lines dropped: the console was not read", "after"]);
}

#[test]
fn a_turns_lines_are_printed_at_once_until_the_console_is_dropped() {
    let (mut console, texts) = Console::new();
    let pending = console.pending.clone();
    let mut out = Printed::default();
    // The first write is refused, and its lines are lost.
    for turn in 0..3 {
        (0..100).for_each(|line| console.log(format_args!("line {turn} {line}")));
        console.flush();
        console.flush();
    }
    drop(console);
    print_texts(texts, &pending, &mut out);
    assert_eq!((out.0.len(), pending.load(Ordering::Relaxed)), (3, 0));
    let text = String::from_utf8(out.0[1..].concat()).unwrap();
    let expected = (100..300).map(|at| format!("Z line {} {}", at / 100, at % 100));
    assert!(text.lines().zip(expected).all(|(line, end)| line.ends_with(&end)));
    assert_eq!(text.lines().count(), 200);
}

#[test]
fn times_are_written_as_rfc_3339_says() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_399, "2000-02-28T23:59:59Z"),
        (951_782_400, "2000-02-29T00:00:00Z"),
        (1_234_567_890, "2009-02-13T23:31:30Z"),
        (1_709_251_199, "2024-02-29T23:59:59Z"),
        (1_735_689_599, "2024-12-31T23:59:59Z"),
        (4_107_542_400, "2100-03-01T00:00:00Z"),
    ] {
        assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), text);
    }
}

// 7. The command line

fn arguments(line: &str) -> Result<Command, String> {
    parse_arguments(line.split_whitespace().map(str::to_owned))
}

#[test]
fn options_are_parsed() {
    let line = "--max-clients 5 --max-per-ip=2 --name-timeout 7 --verbose [::1]:80";
    let Ok(Command::Run(it)) = arguments(line) else { panic!("refused") };
    assert_eq!(it.address, Address { host: Some("::1".to_owned()), port: 80 });
    assert_eq!((it.max_clients, it.max_per_ip, it.verbose), (5, Some(2), true));
    assert_eq!(it.name_timeout, Duration::from_secs(7));
    let Ok(Command::Run(it)) = arguments("") else { panic!("refused") };
    assert_eq!(it.address, Address { host: None, port: 9999 });
    assert_eq!((it.max_clients, it.max_per_ip, it.verbose), (usize::MAX, None, false));
    assert_eq!(it.name_timeout, NAME_TIMEOUT);
    assert_eq!(arguments("-x --help"), Err("there is no option -x".to_owned()));
    for (line, shown) in
        [("--help", "--verbose "), ("-h --x", "SIGHUP"), ("-V", "linechat-server ")]
    {
        assert!(
            matches!(arguments(line), Ok(Command::Show(text)) if text.contains(shown)),
            "{line}"
        );
    }
}

#[test]
fn addresses_are_hosts_ports_or_both() {
    for (text, host, port) in [
        ("9991", "", 9991),
        (":9991", "", 9991),
        ("0", "", 0),
        ("127.0.0.1", "127.0.0.1", 9999),
        ("127.0.0.1:9991", "127.0.0.1", 9991),
        ("::1", "::1", 9999),
        ("::", "::", 9999),
        ("::ffff:1.2.3.4", "::ffff:1.2.3.4", 9999),
        ("[::1]", "::1", 9999),
        ("[::1]:9991", "::1", 9991),
        ("localhost", "localhost", 9999),
        ("localhost:9991", "localhost", 9991),
    ] {
        let host = Some(host.to_owned()).filter(|host| !host.is_empty());
        assert_eq!(parse_address(text), Ok(Address { host, port }), "{text}");
    }
    let bad = "|:|65536|localhost:|localhost:http|a:1:2|[::1|::1]|[::1]x|[::1]:|[localhost]:1|[]|a b|[1.2.3.4]:1|http://a:1";
    for text in bad.split('|') {
        let error = parse_address(text).expect_err(text);
        assert!(error.starts_with(&format!("'{text}' is not an address")), "{error}");
    }
}

#[test]
fn bad_usage_is_named() {
    for (line, named) in [
        ("--max-clients", "--max-clients needs a number"),
        ("--max-clients x", "--max-clients takes a whole number from 1 to 4294967295, not 'x'"),
        ("--max-clients 0", "'0'"),
        ("--max-per-ip=-1", "'-1'"),
        ("--name-timeout 1.5", "'1.5'"),
        ("--name-timeout=", "''"),
        ("--verbose=yes", "no option --verbose=yes"),
        ("--nonsense", "no option --nonsense"),
        ("-x:1", "no option -x:1"),
        ("localhost:http", "'localhost:http'"),
        ("a:1 b:2", "'b:2' is a second address"),
    ] {
        let error = arguments(line).expect_err(line);
        assert!(error.contains(named), "{line}: {error}");
    }
}

#[test]
fn without_a_host_the_server_listens_on_ipv6_only_where_that_serves_ipv4_too() {
    let addresses = |bindv6only| format!("{:?}", any_addresses(9, Some(bindv6only)));
    assert_eq!(addresses("0\n"), "[[::]:9, 0.0.0.0:9]");
    assert_eq!(addresses("1\n"), "[0.0.0.0:9]");
}

#[test]
fn an_error_tells_why_the_server_cannot_listen() {
    let explain = |host: Option<&str>, kind: ErrorKind| {
        explain(&Address { host: host.map(str::to_owned), port: 80 }, kind.into())
    };
    let denied = explain(Some("::1"), ErrorKind::PermissionDenied);
    assert!(denied.contains("::1 port 80") && denied.contains("below 1024"), "{denied}");
    let in_use = explain(None, ErrorKind::AddrInUse);
    assert!(in_use.contains("on port 80") && in_use.contains("another port"), "{in_use}");
}

// The document

#[test]
fn the_document_has_the_same_limits_and_the_sections_that_comments_name() {
    let document = include_str!("../../PROTOCOL.md");
    let (kib, mib) = (|bytes: usize| bytes >> 10, |bytes: usize| bytes >> 20);
    for row in [
        format!("| request | {MAX_REQUEST} bytes "),
        format!("| server line | {MAX_LINE} bytes "),
        format!("| name | {MAX_NAME} bytes |"),
        format!("| pushed roster | {MAX_PUSHED_ROSTER} people |"),
        format!("| name time-out | {} s,", NAME_TIMEOUT.as_secs()),
        format!("until the client closes, for at most {} s;", CLOSE_TIMEOUT.as_secs()),
        format!("| waiting replies | {} KiB |", kib(REPLY_LIMIT)),
        format!("| soft limit | {} KiB |", kib(SOFT_LIMIT)),
        format!("| own lines | {} MiB |", mib(OWN_BYTES_LIMIT)),
        format!("| budget | {0} KiB/s, saved up to {0} KiB |", kib(BUDGET)),
        format!("| hard limit | {} MiB |", mib(HARD_LIMIT)),
        format!("| stall | {} s |", STALL_TIMEOUT.as_secs()),
        format!("| closing | {} s |", CLOSE_TIMEOUT.as_secs()),
        format!("| stopping | {} s |", STOP_TIMEOUT.as_secs()),
    ] {
        assert!(document.contains(&row), "{row}");
    }
    // A comment may go on in the next line.
    let programs = [include_str!("../../server.rs"), include_str!("../../client.rs")].concat();
    let comments = programs.lines().map(|line| line.trim_start_matches([' ', '/']));
    let comments = comments.collect::<Vec<_>>().join(" ");
    let mut sections = 0;
    for named in comments.split("(PROTOCOL.md, ").skip(1) {
        let named = named.split(')').next().unwrap_or_default();
        for section in named.split('"').skip(1).step_by(2) {
            assert!(document.contains(&format!("\n## {section}\n")), "{section}");
            sections += 1;
        }
    }
    assert!(sections > 15, "{sections}");
}

// 8. The operating system

fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

const NEITHER: Interest = Interest { read: false, write: false };

/// A test that waits this long for a peer or the kernel is stuck.
const STUCK: Duration = Duration::from_secs(10);

/// What a poller reports next: token, readable, writable, failed. A child of another test may keep
/// copies of this process's descriptors until it runs its program, and so delay the end of a stream.
fn reported(poller: &mut system::Poller) -> Vec<(usize, bool, bool, bool)> {
    let mut ready = Vec::new();
    poller.wait(&mut ready, Some(STUCK)).unwrap();
    ready.iter().map(|it| (it.token, it.readable, it.writable, it.failed)).collect()
}

/// The poller waits for as long as it is asked to, and reports nothing.
fn assert_waits(poller: &mut system::Poller) {
    let (mut ready, begun, moment) = (Vec::new(), Instant::now(), Duration::from_millis(20));
    poller.wait(&mut ready, Some(moment)).unwrap();
    assert_eq!(ready, []);
    assert!(begun.elapsed() >= moment, "it did not wait");
}

#[test]
fn the_poller_reports_readiness_for_as_long_as_it_lasts() {
    let mut poller = system::Poller::new().unwrap();
    let (mut near, mut far) = socket_pair();
    poller.add(&near, 7, READ).unwrap();
    assert_waits(&mut poller);
    far.write_all(b"x").unwrap();
    assert_eq!(reported(&mut poller), [(7, true, false, false)]);
    assert_eq!(reported(&mut poller), [(7, true, false, false)]);
    poller.modify(&near, 7, Interest { read: true, write: true }).unwrap();
    assert_eq!(reported(&mut poller), [(7, true, true, false)]);
    near.read_exact(&mut [0]).unwrap();
    assert_eq!(reported(&mut poller), [(7, false, true, false)]);
    poller.modify(&near, 7, NEITHER).unwrap();
    far.write_all(b"x").unwrap();
    assert_waits(&mut poller);
    poller.delete(&near, 7).unwrap();
    drop(far);
    assert_waits(&mut poller);
}

#[test]
#[cfg(target_os = "linux")]
fn the_poller_reports_failures_that_were_not_asked_for() {
    let mut poller = system::Poller::new().unwrap();
    let (mut near, far) = socket_pair();
    poller.add(&near, 7, NEITHER).unwrap();
    // A peer that closes with something unread resets the connection.
    near.write_all(b"x").unwrap();
    drop(far);
    assert_eq!(reported(&mut poller), [(7, true, true, true)]);
    poller.delete(&near, 7).unwrap();
    // The end of one side is not a failure; the end of both is, to epoll(7).
    let (near, far) = socket_pair();
    poller.add(&near, 8, READ).unwrap();
    far.shutdown(Shutdown::Write).unwrap();
    assert_eq!(reported(&mut poller), [(8, true, false, false)]);
    near.shutdown(Shutdown::Write).unwrap();
    let is_epoll = cfg!(not(linechat_poll));
    assert_eq!(reported(&mut poller), [(8, true, is_epoll, is_epoll)]);
    poller.delete(&near, 8).unwrap();
    // A failure without a hang-up: a pipe without a reader.
    let mut child = Process::new("true").stdin(Stdio::piped()).spawn().unwrap();
    let pipe = child.stdin.take().unwrap();
    child.wait().unwrap();
    poller.add(&pipe, 9, NEITHER).unwrap();
    assert_eq!(reported(&mut poller), [(9, true, true, true)]);
}

#[test]
#[cfg(linechat_poll)]
fn a_hang_up_rests_unless_reading_was_asked_for() {
    // A pipe without a writer hangs up, and is not readable (poll(2)).
    let mut child = Process::new("true").stdout(Stdio::piped()).spawn().unwrap();
    let pipe = child.stdout.take().unwrap();
    child.wait().unwrap();
    let mut poller = system::Poller::new().unwrap();
    poller.add(&pipe, 7, READ).unwrap();
    assert_eq!(reported(&mut poller), [(7, true, false, false)]);
    poller.modify(&pipe, 7, NEITHER).unwrap();
    let mut ready = Vec::new();
    poller.wait(&mut ready, None).unwrap();
    assert_eq!(ready, []);
    // The system would report it again at once.
    assert_waits(&mut poller);
    poller.modify(&pipe, 7, READ).unwrap();
    assert_eq!(reported(&mut poller), [(7, true, false, false)]);
}

#[test]
fn an_interruption_is_not_a_failure_of_the_poller() {
    let waited = |kind: ErrorKind| system::ready_count(Err(kind.into())).ok();
    assert_eq!(waited(ErrorKind::Interrupted), Some(0));
    assert_eq!(waited(ErrorKind::InvalidInput), None);
}

#[test]
fn without_a_time_out_the_poller_waits_for_readiness() {
    let mut poller = system::Poller::new().unwrap();
    let (near, mut far) = socket_pair();
    poller.add(&near, 7, READ).unwrap();
    let waiting = std::thread::spawn(move || {
        let mut ready = Vec::new();
        poller.wait(&mut ready, None).unwrap();
        ready.len()
    });
    // Another poller lets some time pass.
    assert_waits(&mut system::Poller::new().unwrap());
    far.write_all(b"x").unwrap();
    assert_eq!(waiting.join().unwrap(), 1);
}

#[test]
#[cfg(target_os = "linux")]
fn the_kernel_keeps_at_most_256_kib_for_a_slow_peer() {
    let (mut near, far) = socket_pair();
    system::set_socket_options(&near);
    near.set_nonblocking(true).unwrap();
    let mut taken = 0;
    while let Ok(length) = near.write(&[0; 16 * 1024]) {
        taken += length;
    }
    let received = far.peek(&mut vec![0; taken]).unwrap();
    let kept = (taken - received) / 1024;
    assert!((128..=256).contains(&kept), "the kernel keeps {kept} KiB");
}

#[test]
#[cfg(target_os = "linux")]
fn hundreds_of_connections_can_wait_to_be_accepted() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    system::set_accept_queue(&listener);
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    let most: usize = most.trim().parse().unwrap();
    // A connection that finds the queue full is tried again for minutes.
    let address = listener.local_addr().unwrap();
    for _ in 0..most.min(200) {
        TcpStream::connect_timeout(&address, STUCK).expect("space in the queue");
    }
}

//! The lines for everybody, in their one order, and what each member must receive of them.

// Each of the programs that include this file uses a part of it.
#![allow(dead_code)]

use std::collections::HashMap;
use std::ops::Range;

/// All lines for everybody: what a member that says nothing receives.
#[derive(Default)]
pub struct History {
    pub text: Vec<u8>,
    /// Everybody who has joined, by name; of a name that came again, the last.
    pub members: HashMap<String, Membership>,
}

/// Where a member's lines stand in the history.
#[derive(Default)]
pub struct Membership {
    /// The end of its JOINED.
    pub joined: usize,
    /// The start of its LEFT, and the reason given there; `None` while it is in the room.
    pub left: Option<(usize, String)>,
    /// Its messages, which it does not receive.
    pub said: Vec<Range<usize>>,
}

impl Membership {
    /// This member is in the room for somebody who has received the history up to `position`.
    pub fn is_here(&self, position: usize) -> bool {
        self.joined <= position && self.left.as_ref().is_none_or(|left| position <= left.0)
    }
}

impl History {
    pub fn is_here(&self, name: &str, position: usize) -> bool {
        self.members.get(name).is_some_and(|member| member.is_here(position))
    }

    /// Appends a line, given without its ending. Only a member may say something or leave, and only
    /// a free name may join.
    pub fn push(&mut self, line: &str) {
        let start = self.text.len();
        self.text.extend(line.as_bytes());
        self.text.extend(b"\r\n");
        let end = self.text.len();
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["JOINED", name, _] => {
                let joined = Membership { joined: end, ..Membership::default() };
                let before = self.members.insert(name.to_owned(), joined);
                assert!(before.is_none_or(|it| it.left.is_some()), "in the room already: {line}");
            }
            ["LEFT", name, _, reason] => {
                self.present(name, line).left = Some((start, reason.to_owned()))
            }
            ["MSG", name, ..] => self.present(name, line).said.push(start..end),
            ["USERS", ..] => {}
            _ => panic!("not a line for everybody: {line}"),
        }
    }

    fn present(&mut self, name: &str, line: &str) -> &mut Membership {
        let present = self.members.get_mut(name).filter(|it| it.left.is_none());
        present.unwrap_or_else(|| panic!("not in the room: {line}"))
    }
}

/// How much of a history one member has received: all lines for everybody between its own JOINED and
/// its own LEFT, without its own messages.
#[derive(Clone, Default)]
pub struct Received {
    pub name: String,
    /// `None` before its first line.
    pub position: Option<usize>,
    /// How many of its own messages stand before `position`.
    pub own: usize,
}

impl Received {
    pub fn new(name: &str) -> Received {
        Received { name: name.to_owned(), ..Received::default() }
    }

    /// What must come next: up to the member's next message, its LEFT, or the end of the history.
    /// Empty if nothing more is known to come.
    pub fn next<'a>(&mut self, history: &'a History) -> &'a [u8] {
        let Some(member) = history.members.get(&self.name) else { return &[] };
        let position = self.position.get_or_insert(member.joined);
        while let Some(own) = member.said.get(self.own).filter(|own| own.start == *position) {
            *position = own.end;
            self.own += 1;
        }
        let left = member.left.as_ref().map_or(history.text.len(), |left| left.0);
        let end = member.said.get(self.own).map_or(left, |own| own.start);
        &history.text[*position..end]
    }

    /// The member has received this many bytes of what `next` returned.
    pub fn advance(&mut self, bytes: usize) {
        self.position = self.position.map(|position| position + bytes);
    }

    /// The member has received this line, given without its ending: it must come next.
    pub fn line(&mut self, line: &str, history: &History) {
        let next = self.next(history);
        let next = next.split(|&byte| byte == b'\r').next().unwrap_or_default();
        assert_eq!(line, String::from_utf8_lossy(next), "what {} received", self.name);
        self.advance(line.len() + 2);
    }
}

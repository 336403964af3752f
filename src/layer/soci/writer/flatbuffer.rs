//! Writes FlatBuffers from their end to their start, in the way and the order of the official builders.

/// A FlatBuffer that grows at its front. A place in it is its distance from the end.
#[derive(Debug, Default)]
pub(super) struct Builder {
    /// Backwards: the last byte of the buffer is the first here.
    reversed: Vec<u8>,
    align: usize,
    /// The places of the vtables and their fields, so that equal tables share one.
    vtables: Vec<(usize, Vec<u8>)>,
}

/// A table being written: the places of its fields.
#[derive(Debug)]
pub(super) struct Open {
    start: usize,
    fields: Vec<usize>,
}

/// The place of something that can be referred to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(usize);

impl Builder {
    fn put(&mut self, bytes: &[u8]) {
        self.reversed.extend(bytes.iter().rev());
    }

    /// Pads so that something of `size` stands aligned once `more` bytes are written before it.
    fn align(&mut self, size: usize, more: usize) {
        self.align = self.align.max(size);
        let padding = (self.reversed.len() + more).wrapping_neg() & (size - 1);
        self.reversed.resize(self.reversed.len() + padding, 0);
    }

    fn put_aligned(&mut self, bytes: &[u8]) {
        self.align(bytes.len(), 0);
        self.put(bytes);
    }

    fn put_offset(&mut self, to: Place) {
        self.align(4, 0);
        let offset = (self.reversed.len() - to.0 + 4) as u32;
        self.put(&offset.to_le_bytes());
    }

    pub(super) fn string(&mut self, text: &[u8]) -> Place {
        self.align(4, text.len() + 1);
        self.put(&[0]);
        self.end_bytes(text)
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Place {
        self.align(4, bytes.len());
        self.end_bytes(bytes)
    }

    fn end_bytes(&mut self, bytes: &[u8]) -> Place {
        self.put(bytes);
        self.put(&(bytes.len() as u32).to_le_bytes());
        Place(self.reversed.len())
    }

    pub(super) fn vector(&mut self, elements: &[Place]) -> Place {
        self.align(4, 4 * elements.len());
        elements
            .iter()
            .rev()
            .for_each(|element| self.put_offset(*element));
        self.put(&(elements.len() as u32).to_le_bytes());
        Place(self.reversed.len())
    }

    /// Begins a table. Its strings, vectors and tables must be written before.
    pub(super) fn table(&self) -> Open {
        Open {
            start: self.reversed.len(),
            fields: Vec::new(),
        }
    }

    /// A number as a field, left out where it is what readers take for an absent one.
    pub(super) fn number<const N: usize>(&mut self, table: &mut Open, field: usize, bytes: [u8; N]) {
        if bytes != [0; N] {
            self.put_aligned(&bytes);
            self.note(table, field);
        }
    }

    pub(super) fn refer(&mut self, table: &mut Open, field: usize, to: Place) {
        self.put_offset(to);
        self.note(table, field);
    }

    fn note(&self, table: &mut Open, field: usize) {
        table.fields.resize(table.fields.len().max(field + 1), 0);
        table.fields[field] = self.reversed.len();
    }

    pub(super) fn end(&mut self, table: &Open) -> Place {
        self.put_aligned(&[0; 4]);
        let object = self.reversed.len();
        let place = |field: &usize| if *field == 0 { 0 } else { object - field };
        let mut vtable = Vec::new();
        for number in [table.fields.len() * 2 + 4, object - table.start] {
            vtable.extend_from_slice(&(number as u16).to_le_bytes());
        }
        for field in &table.fields {
            vtable.extend_from_slice(&(place(field) as u16).to_le_bytes());
        }
        let known = self.vtables.iter().rev().find(|(_, known)| *known == vtable);
        let at = match known {
            Some((at, _)) => *at,
            None => {
                self.put(&vtable);
                self.vtables.push((self.reversed.len(), vtable));
                self.reversed.len()
            }
        };
        // From the table back to its vtable, which may stand behind it.
        let back = (at as i64 - object as i64) as i32;
        self.reversed[object - 4..object].copy_from_slice(&back.to_be_bytes());
        Place(object)
    }

    pub(super) fn finish(mut self, root: Place) -> Vec<u8> {
        self.align(self.align.max(4), 4);
        self.put_offset(root);
        self.reversed.reverse();
        self.reversed
    }
}

// SPDX-License-Identifier: Apache-2.0

package inference

// value reads the value at the cursor, of any kind, and checks its syntax.
func (c *cursor) value() token {
	first := c.space()
	t := token{kind: first, chunk: c.chunk, at: c.pos, Span: Span{Start: c.offset()}}
	switch first {
	case '"':
		return c.str()
	case '{':
		c.enter()
		for o := (object{}); c.member(&o); {
			c.value()
		}
	case '[':
		c.list(c.skip)
	case 't':
		c.literal("true")
	case 'f':
		c.literal("false")
	case 'n':
		c.literal("null")
	case 'N':
		c.literal("NaN")
	case 'I':
		t.kind = 'N'
		c.literal("Infinity")
	case '-':
		c.pos++
		if t.kind = '0'; c.peek() == 'I' {
			t.kind = 'N'
			c.literal("Infinity")
		} else {
			c.number()
		}
	default:
		t.kind = '0'
		c.number()
	}
	t.End = c.offset()
	return t
}

// skip reads a value that does not matter.
func (c *cursor) skip() { c.value() }

// literal reads a word of JSON, or one of those that Python adds.
func (c *cursor) literal(word string) {
	for i := range len(word) {
		if c.peek() != word[i] {
			c.unexpected(word)
			return
		}
		c.pos++
	}
}

// number reads a number whose sign was read.
func (c *cursor) number() {
	if c.peek() == '0' {
		c.pos++
	} else {
		c.digits("a value")
	}
	if c.peek() == '.' {
		c.pos++
		c.digits("a digit")
	}
	if b := c.peek(); b == 'e' || b == 'E' {
		c.pos++
		if b := c.peek(); b == '+' || b == '-' {
			c.pos++
		}
		c.digits("a digit")
	}
}

// digits reads one digit or more.
func (c *cursor) digits(want string) {
	if b := c.peek(); b < '0' || b > '9' {
		c.unexpected(want)
		return
	}
	for {
		for c.pos < len(c.cur) && c.cur[c.pos]-'0' <= 9 {
			c.pos++
		}
		if c.pos < len(c.cur) || !c.more() {
			return
		}
	}
}

// naturals reads numbers without sign, fraction or exponent that a comma follows, as far as the chunk goes, and counts
// them: nearly all of a list of token ids. It ends where the next element must be.
func (c *cursor) naturals() int {
	count, b, i := 0, c.cur, c.pos
	for {
		for i < len(b) && b[i] == ' ' {
			i++
		}
		first := i
		for i < len(b) && b[i]-'0' <= 9 {
			i++
		}
		if i == first || i >= len(b) || b[i] != ',' || b[first] == '0' && i > first+1 {
			return count
		}
		i++
		count++
		c.pos = i
	}
}

// An object is one that is being read, member by member.
type object struct {
	id      int   // for records
	members int   // so far
	key     token // of the present member
	prevEnd int   // where the value before it ended; just after the brace for the first
	last    int   // index of the record of the member before it; -1 without one
}

// enter goes into the object or array that starts at the cursor.
func (c *cursor) enter() {
	if c.depth++; c.depth > maxDepth {
		c.fail("nested too deeply")
		return
	}
	c.pos++
}

// leave goes out of it; the closing byte is the next one.
func (c *cursor) leave() {
	c.depth--
	c.pos++
}

// member reads up to the next member's value; false means that there is none.
func (c *cursor) member(o *object) bool {
	o.prevEnd = c.offset()
	b := c.space()
	if b == '}' {
		c.leave()
		return false
	}
	if o.members > 0 {
		if b != ',' {
			c.unexpected("a comma or the object's end")
			return false
		}
		c.pos++
		b = c.space()
	}
	if b != '"' {
		c.unexpected("a key")
		return false
	}
	o.key = c.str()
	if c.space() != ':' {
		c.unexpected("a colon")
		return false
	}
	c.pos++
	c.space()
	o.members++
	return true
}

// list reads an array. It calls element at each one, and that must read it.
func (c *cursor) list(element func()) {
	c.enter()
	for n := 0; ; n++ {
		b := c.space()
		if b == ']' {
			c.leave()
			return
		}
		if n > 0 {
			if b != ',' {
				c.unexpected("a comma or the array's end")
				return
			}
			c.pos++
			if c.space() == ']' {
				c.unexpected("a value")
				return
			}
		}
		element()
	}
}

// end makes sure that nothing follows.
func (c *cursor) end() {
	if c.space() != 0 || c.pos < len(c.cur) {
		c.unexpected("the end")
	}
}

// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"cmp"
	"slices"
)

// A splice puts text in place of a span of the body.
type splice struct {
	Span
	text []byte
}

// build turns the edits into splices and these into chunks.
func (e *Edits) build() {
	if e.built {
		return
	}
	e.built = true
	e.splices = make([]splice, 0, 8) // not reused: a Reader may still be at work on the old chunks
	scan := &e.req.scan
	if e.req.API == Unknown {
		e.spliceObjects(nil)
	} else {
		top := e.withSampling()
		e.locate(top, scan.top.object)
		e.locate(e.sampling, scan.sampling.object)
		e.spliceObjects(top)
		e.grow(top, scan.top)
		e.grow(e.sampling, scan.sampling)
	}
	// Outer splices come before those inside them, which then count for nothing.
	slices.SortStableFunc(e.splices, func(a, b splice) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(b.End, a.End))
	})
	e.cut()
}

// withSampling returns the top level's edits and, where there is no object to hold them, one that adds those of
// sampling_params.
func (e *Edits) withSampling() []edit {
	if kind := e.req.scan.samplingKind; kind != 0 && kind != 'n' {
		return e.top
	}
	var value []byte
	for i := range e.sampling {
		if e.sampling[i].value != nil {
			value = appendField(value, &e.sampling[i], len(value) > 0)
		}
	}
	if value == nil || slices.ContainsFunc(e.top, func(x edit) bool { return x.name == samplingParamsKey }) {
		return e.top
	}
	value = append(append([]byte{'{'}, value...), '}')
	return append(slices.Clone(e.top), edit{name: samplingParamsKey, value: value})
}

// recordsOf returns the members of one object that were recorded.
func (e *Edits) recordsOf(object int) []record {
	records := e.req.scan.records
	byObject := func(r record, id int) int { return cmp.Compare(r.object, id) }
	i, _ := slices.BinarySearchFunc(records, object, byObject)
	j, _ := slices.BinarySearchFunc(records, object+1, byObject)
	return records[i:j]
}

// locate finds the last member that each edit is about.
func (e *Edits) locate(edits []edit, object int) {
	var buf [maxKey]byte
	records := e.recordsOf(object)
	for i := range edits {
		edits[i].index = -1
		for j := range slices.Backward(records) {
			if string(content(buf[:], e.req.Body.Chunks, records[j].key)) == edits[i].name {
				edits[i].index = records[j].index
				break
			}
		}
	}
}

// spliceObjects replaces and removes members.
func (e *Edits) spliceObjects(top []edit) {
	records := e.req.scan.records
	for len(records) > 0 {
		id, n := records[0].object, 1
		for n < len(records) && records[n].object == id {
			n++
		}
		switch id {
		case e.req.scan.top.object:
			e.spliceObject(records[:n], top)
		case e.req.scan.sampling.object:
			e.spliceObject(records[:n], e.sampling)
		default:
			e.spliceObject(records[:n], nil)
		}
		records = records[n:]
	}
}

func (e *Edits) spliceObject(members []record, edits []edit) {
	for i := 0; i < len(members); i++ {
		text, gone := e.fate(&members[i], edits)
		if text != nil {
			e.splices = append(e.splices, splice{members[i].value, text})
		}
		if !gone {
			continue
		}
		first := i
		for i+1 < len(members) && members[i+1].index == members[i].index+1 {
			if _, gone := e.fate(&members[i+1], edits); !gone {
				break
			}
			i++
		}
		e.splices = append(e.splices, splice{Span: run(&members[first], &members[i])})
	}
}

// fate says what becomes of a member: a new value, or none.
func (e *Edits) fate(m *record, edits []edit) (text []byte, gone bool) {
	var buf [maxKey]byte
	if len(edits) > 0 {
		key := content(buf[:], e.req.Body.Chunks, m.key)
		for i := range edits {
			if x := &edits[i]; x.name == string(key) {
				if x.value != nil && x.index == m.index {
					return x.value, false
				}
				return nil, true
			}
		}
	}
	return nil, e.strip && m.transfer
}

// run is what to cut for a run of neighbours: with the comma before it, or with the one after it at the object's
// beginning, or without any when nothing else is there.
func run(first, last *record) Span {
	switch {
	case first.index > 0:
		return Span{first.prevEnd, last.value.End}
	case last.next > 0:
		return Span{first.key.Start - 1, last.next}
	}
	return Span{first.key.Start - 1, last.value.End}
}

// grow adds at an object's end the fields that it does not have.
func (e *Edits) grow(edits []edit, at extent) {
	if at.object < 0 {
		return
	}
	var text []byte
	comma := false // whether a member stays
	for i := range edits {
		x := &edits[i]
		if x.value == nil || x.index >= 0 {
			continue
		}
		if text == nil {
			comma = e.anyLeft(edits, at)
		}
		text = appendField(text, x, comma)
		comma = true
	}
	if text != nil {
		e.splices = append(e.splices, splice{Span{at.end, at.end}, text})
	}
}

// anyLeft reports whether any member of an object stays.
func (e *Edits) anyLeft(edits []edit, at extent) bool {
	records := e.recordsOf(at.object)
	for i := range records {
		if _, gone := e.fate(&records[i], edits); !gone {
			return true
		}
	}
	return len(records) < at.members
}

func appendField(dst []byte, x *edit, comma bool) []byte {
	if comma {
		dst = append(dst, ',')
	}
	if n, _ := plain([]byte(x.name)); n == len(x.name) {
		dst = append(append(append(dst, '"'), x.name...), '"')
	} else {
		dst = append(dst, quote(x.name)...)
	}
	dst = append(dst, ':')
	return append(dst, x.value...)
}

// cut lays the splices over the body's chunks.
func (e *Edits) cut() {
	body := e.req.Body
	e.size = body.Len
	if len(e.splices) == 0 {
		e.chunks = body.Chunks
		return
	}
	c := cutter{chunks: body.Chunks, out: make([][]byte, 0, len(body.Chunks)+2*len(e.splices))}
	done := 0
	for _, s := range e.splices {
		if s.Start < done {
			continue // inside the one before it
		}
		c.copyTo(s.Start)
		if len(s.text) > 0 {
			c.out = append(c.out, s.text)
		}
		c.skipTo(s.End)
		done = s.End
		e.size += len(s.text) - s.Len()
	}
	c.copyTo(body.Len)
	e.chunks = c.out
}

// A cutter goes over chunks from front to back.
type cutter struct {
	chunks [][]byte
	out    [][]byte
	at     int // in the first of chunks
	offset int // in the body
}

func (c *cutter) copyTo(offset int) { c.walk(offset, true) }
func (c *cutter) skipTo(offset int) { c.walk(offset, false) }

func (c *cutter) walk(offset int, keep bool) {
	for c.offset < offset && len(c.chunks) > 0 {
		piece := c.chunks[0][c.at:]
		if n := offset - c.offset; n < len(piece) {
			piece = piece[:n:n] // an append by a reader must not reach the body
			c.at += n
		} else {
			c.chunks, c.at = c.chunks[1:], 0
		}
		c.offset += len(piece)
		if keep && len(piece) > 0 {
			c.out = append(c.out, piece)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"cmp"
	"slices"
)

// maxRecords bounds how many members are remembered for edits: no client sends that many fields.
const maxRecords = 4096

// A record is one member of an object that may be edited: one of the top level, one of sampling_params, or a transfer
// field wherever an engine would read it. Removing it needs its neighbours' borders (see run).
type record struct {
	object   int // 0 for the top level
	index    int // in the object
	transfer bool
	key      token
	prevEnd  int // where the value before it ended; just after the brace for the first
	value    Span
	next     int // where the next key starts; 0 for the last
}

// scanned is what edits need to know of a body.
type scanned struct {
	records  []record // by object, then by index
	top      extent
	sampling extent // of the last sampling_params, if that is an object
	// samplingKind is the first byte of the last sampling_params' value, 0 without one.
	samplingKind byte
}

// An extent is where an object may grow.
type extent struct {
	object  int // -1 when there is none
	members int
	end     int // of the last value, or just after the opening brace
}

// A parser fills in a request while it walks over its body once.
type parser struct {
	cursor
	req     *Request
	sparse  bool // keep records of transfer fields only
	objects int  // ids given out

	top      [scalars]token
	sampling [scalars]token
	seen     [names]Span // where the last value of each prompt field was
	batches  [names]batch
}

// A batch is how many prompts a field holds.
type batch struct{ prompts, tokenIDs int }

// Parse reads body once as api's request. r.Path, Method and Headers are set by the caller on the returned value.
// For [Unknown] any JSON text will do, and only what docs/design.md 3.6 asks is looked for: transfer fields in an object.
// JSON is read as strictly as by encoding/json, but Python's NaN, Infinity and -Infinity are values; keys are
// compared after unescaping, and of duplicates the last one counts, as in the engines. Errors wrap [ErrMalformed] and
// say what is wrong and where. The slices of body are kept and never written to.
func Parse(api API, body Body) (*Request, error) {
	r := Unread(body)
	if api == Unknown && body.Len == 0 {
		return r, nil
	}
	r.API = api
	p := parser{cursor: newCursor(body.Chunks), req: r, sparse: api == Unknown}
	switch {
	case p.space() == '{':
		p.topLevel()
	case api == Unknown:
		p.value()
	default:
		p.unexpected("a JSON object")
	}
	p.end()
	r.Body.Len = p.offset()
	slices.SortStableFunc(r.scan.records, func(a, b record) int { return cmp.Compare(a.object, b.object) })
	if api != Unknown && p.err == nil {
		p.settle()
	}
	if p.err != nil {
		return nil, p.err
	}
	return r, nil
}

// Unread is the request for a body that is not looked into, such as one of another content type on an unknown path.
// Its edits change nothing.
func Unread(body Body) *Request {
	return &Request{
		Body: body, N: 1, Prompts: 1, Bars: BarNotJSON,
		scan: scanned{top: extent{object: -1}, sampling: extent{object: -1}},
	}
}

func (p *parser) topLevel() {
	if !p.sparse {
		p.req.scan.records = make([]record, 0, 16)
		p.req.Text = make([]Span, 0, min(16+p.req.Body.Len/256, 256))
	}
	o := p.begin()
	for p.member(&o) {
		n := lookUp(p.content(o.key))
		start := p.offset()
		switch {
		case n == other || n == transfer:
			p.value()
		case n < scalars:
			p.top[n] = p.value()
		case n == samplingParams:
			p.readSampling()
		case n == extraArgs:
			p.readExtraArgs()
		default:
			p.readPrompt(n)
		}
		p.record(&o, n, start)
	}
	p.req.scan.top = extent{object: o.id, members: o.members, end: o.prevEnd}
}

func (p *parser) readPrompt(n name) {
	if p.seen[n].End > 0 {
		p.forget(p.seen[n])
	}
	start := p.offset()
	p.batches[n] = batch{}
	p.read(readings[p.req.API][n], &p.batches[n])
	p.seen[n] = Span{start, p.offset()}
}

// begin enters an object whose members may be recorded.
func (p *parser) begin() object {
	o := object{id: p.objects, last: -1}
	p.objects++
	p.enter()
	return o
}

// record remembers the member whose value was just read.
func (p *parser) record(o *object, n name, start int) {
	scan := &p.req.scan
	if o.last >= 0 {
		scan.records[o.last].next = o.key.Start - 1
		o.last = -1
	}
	if n == transfer {
		p.req.HasTransferFields = true
	} else if p.sparse {
		return
	}
	if len(scan.records) == maxRecords {
		p.fail("too many fields")
		return
	}
	o.last = len(scan.records)
	scan.records = append(scan.records, record{
		object: o.id, index: o.members - 1, transfer: n == transfer,
		key: o.key, prevEnd: o.prevEnd, value: Span{start, p.offset()},
	})
}

// readSampling reads an object of sampling parameters. SGLang also takes a list of them, one per prompt, in which only
// transfer fields and the number of choices matter.
func (p *parser) readSampling() {
	scan := &p.req.scan
	p.sampling = [scalars]token{}
	scan.sampling = extent{object: -1}
	scan.samplingKind = p.peek()
	switch scan.samplingKind {
	case '{':
		o := p.samplingObject()
		scan.sampling = extent{object: o.id, members: o.members, end: o.prevEnd}
	case '[':
		before := p.sparse
		p.sparse = true
		var n token // SGLang wants the same of all
		p.list(func() {
			if p.peek() != '{' {
				p.value()
				return
			}
			p.samplingObject()
			if !absent(p.sampling[choices]) {
				n = p.sampling[choices]
			}
			p.sampling = [scalars]token{}
		})
		p.sparse, p.sampling[choices] = before, n
	default:
		p.value()
	}
}

func (p *parser) samplingObject() object {
	o := p.begin()
	for p.member(&o) {
		n := lookUp(p.content(o.key))
		start := p.offset()
		switch {
		case n == extraArgs:
			p.readExtraArgs()
		case n < scalars:
			p.sampling[n] = p.value()
		default:
			p.value()
		}
		p.record(&o, n, start)
	}
	return o
}

// readExtraArgs reads an object that engines hand on to their connectors: sampling_params.extra_args, and the top
// level's vllm_xargs, which vLLM turns into the former.
func (p *parser) readExtraArgs() {
	if p.peek() != '{' {
		p.value()
		return
	}
	before := p.sparse
	p.sparse = true
	for o := p.begin(); p.member(&o); {
		start := p.offset()
		p.value()
		p.record(&o, lookUp(p.content(o.key)), start)
	}
	p.sparse = before
}

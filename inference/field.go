// SPDX-License-Identifier: Apache-2.0

package inference

// Field returns the raw bytes of a top-level field of a JSON object that lies in one piece, such as the
// kv_transfer_params of a prefill's answer; ok is false when it is absent. Names are case-sensitive and compared after
// unescaping, and the last duplicate wins. The whole object is checked, as strictly as by [Parse]; an error wraps
// [ErrMalformed]. raw is a slice of data.
func Field(data []byte, field string) (raw []byte, ok bool, err error) {
	c := newCursor([][]byte{data})
	if c.space() != '{' {
		c.unexpected("a JSON object")
		return nil, false, c.err
	}
	c.enter()
	for o := (object{}); c.member(&o); {
		match := string(c.content(o.key)) == field
		start := c.offset()
		if c.value(); match && c.err == nil {
			raw, ok = data[start:c.offset():c.offset()], true
		}
	}
	if c.end(); c.err != nil {
		return nil, false, c.err
	}
	return raw, ok, nil
}

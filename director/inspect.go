// SPDX-License-Identifier: Apache-2.0

package director

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/uuid"

	"github.com/baton-epp/baton/inference"
)

// Errors of requests that are refused before anybody is asked for a pick.
var (
	// ErrEncoding: a body with a Content-Encoding on a path whose body must be read (415).
	ErrEncoding = errors.New("compressed request bodies are not accepted on this path; send it without Content-Encoding")
	// ErrBodyMode: the gateway's ext_proc body mode does not let the body be inspected (500, docs/design.md 3.6).
	ErrBodyMode = errors.New("the gateway does not send this body for inspection; set request_body_mode to FULL_DUPLEX_STREAMED or BUFFERED, or limits.allowUninspectedBodies")
)

// inspect reads the request and refuses what could harm a decode server. The edits are still
// empty (the orchestrator removes transfer fields first); nil when there is no JSON object to edit.
func (d *Director) inspect(in *Incoming) (*inference.Request, *inference.Edits, error) {
	path := in.Headers.Get(":path")
	api := inference.PathAPI(path)
	req, err := d.read(api, in)
	if req == nil {
		req = inference.Unread(in.Body)
		req.API = api
	}
	req.Path, req.Method, req.Headers = path, in.Headers.Get(":method"), in.Headers
	req.ID = in.Headers.Get("x-request-id")
	if err != nil {
		return req, nil, err
	}
	if req.ID == "" {
		req.ID = uuid.NewString()
	}
	if req.Bars&inference.BarNotJSON != 0 && !req.HasTransferFields {
		return req, nil, nil
	}
	return req, req.Edit(), nil
}

// read parses the body as far as its path and content type ask for it.
func (d *Director) read(api inference.API, in *Incoming) (*inference.Request, error) {
	switch {
	case in.Uninspected && !d.opts.AllowUninspectedBodies:
		return nil, ErrBodyMode
	case in.Uninspected || !in.HasBody:
		return nil, nil
	case api != inference.Unknown:
		if enc := in.Headers.Get("content-encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
			return nil, ErrEncoding
		}
		req, err := inference.Parse(api, in.Body)
		if err == nil && !req.HasModel && needsModel(api) {
			err = fmt.Errorf("%w: model is missing", inference.ErrMalformed)
		}
		return req, err
	default:
		return d.readUnknown(in)
	}
}

// needsModel reports whether requests of an API must name a model: 400 without one, as the Endpoint Picker Protocol's
// test table has it. Engines' own APIs serve one model and need none.
func needsModel(api inference.API) bool {
	return api != inference.Generate && api != inference.SGLangGenerate
}

// binary are the content types that pass untouched on unknown paths.
var binary = []string{"multipart/", "audio/", "video/", "image/", "application/octet-stream", "application/grpc", "application/x-www-form-urlencoded"}

// readUnknown handles a body on a path that Baton does not know: what calls itself JSON must parse, what could be read
// as JSON by a server that ignores content types is searched for transfer fields, anything else passes.
func (d *Director) readUnknown(in *Incoming) (*inference.Request, error) {
	kind := strings.ToLower(in.Headers.Get("content-type"))
	isJSON := strings.Contains(kind, "json")
	if isJSON && in.Headers.Get("content-encoding") != "" && !strings.EqualFold(in.Headers.Get("content-encoding"), "identity") {
		return nil, ErrEncoding
	}
	if !isJSON {
		for _, b := range binary {
			if strings.HasPrefix(kind, b) {
				return nil, nil
			}
		}
	}
	switch looks := sniff(&in.Body); {
	case looks == looksWide:
		return nil, fmt.Errorf("%w: UTF-16 or UTF-32 text; send UTF-8", inference.ErrMalformed)
	case !isJSON && looks != looksObject:
		return nil, nil
	}
	// Engines read JSON more widely than the standard (vLLM also under text/plain), so what looks like an object and
	// cannot be searched for transfer fields is refused.
	return inference.Parse(inference.Unknown, in.Body)
}

type shape uint8

const (
	looksOther shape = iota
	looksObject
	looksWide
)

// sniff looks at the first bytes of a body: wide encodings show a byte order mark or a NUL among the first four, an
// object shows its brace behind white space and a UTF-8 mark.
func sniff(b *inference.Body) shape {
	seen := 0
	for _, chunk := range b.Chunks {
		for _, c := range chunk {
			if seen < 4 && (c == 0 || c >= 0xfe) {
				return looksWide
			}
			seen++
			switch c {
			case ' ', '\t', '\r', '\n', 0xef, 0xbb, 0xbf:
				continue
			case '{':
				if seen >= 4 || !wideFollows(b, seen) {
					return looksObject
				}
				return looksWide
			default:
				if seen >= 4 {
					return looksOther
				}
			}
		}
	}
	return looksOther
}

// wideFollows reports whether one of the first four bytes from offset on is a NUL.
func wideFollows(b *inference.Body, offset int) bool {
	at := 0
	for _, chunk := range b.Chunks {
		for _, c := range chunk {
			if at >= 4 {
				return false
			}
			if at >= offset && c == 0 {
				return true
			}
			at++
		}
	}
	return false
}

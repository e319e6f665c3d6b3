// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"net/url"
	"path"
	"strings"
)

// suffixes maps what a path may end in to its API; /inference/v1/generate also ends in /generate, so it comes first.
var suffixes = [...]struct {
	path string
	api  API
}{
	{"/v1/chat/completions", Chat},
	{"/v1/completions", Completions},
	{"/v1/responses", Responses},
	{"/v1/embeddings", Embeddings},
	{"/v1/messages", Messages},
	{"/inference/v1/generate", Generate},
	{"/generate", SGLangGenerate},
	{"/invocations", Chat}, // vLLM's SageMaker route takes chat and completion bodies alike
}

// PathAPI tells which API a request's path stands for: the query, a trailing slash and doubled slashes are dropped, then the
// longest known suffix decides. It reads the path as the engines' web server does: percent escapes are decoded once,
// and a line feed at the end does not count (Starlette's patterns end in "$"), so that no spelling of a known path
// is taken for an unknown one.
func PathAPI(target string) API {
	if i := strings.IndexAny(target, "?#"); i >= 0 {
		target = target[:i]
	}
	if api := suffixAPI(target); api != Unknown {
		return api
	}
	return suffixAPI(cleanPath(target))
}

func suffixAPI(target string) API {
	for i := range suffixes {
		if strings.HasSuffix(target, suffixes[i].path) {
			return suffixes[i].api
		}
	}
	return Unknown
}

// cleanPath decodes percent escapes and drops what does not change a path's meaning.
func cleanPath(p string) string {
	if strings.Contains(p, "%") {
		if decoded, err := url.PathUnescape(p); err == nil {
			p = decoded
		}
	}
	return path.Clean("/" + strings.TrimRight(p, "/\n"))
}

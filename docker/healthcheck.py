"""Exit 0 while the server in this container is ready. No proxy is asked, whatever the environment says."""

import os
import urllib.request

address = f"http://127.0.0.1:{os.environ.get('PORT', '8000')}/ready"
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=5)  # raises unless it is a 2xx

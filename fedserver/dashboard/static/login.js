// A link that ends in #token=TOKEN signs in by itself; a fragment is sent to nobody, and is not left in the address.
"use strict";

const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  history.replaceState(null, "", location.pathname);
  document.getElementById("token").value = given;
  document.getElementById("sign").submit();
}
